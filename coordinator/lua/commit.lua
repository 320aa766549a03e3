-- Compare and set: all writes are made, or none.
--
-- ARGV[1]  JSON list of conditions [command, argument..., expected]: the command's reply must equal `expected`
--          (a string, or null for a missing value)
-- ARGV[2]  JSON list of writes [command, argument...]: commands of the server, or one of the three actions below
-- Returns 1 if the writes were made, 0 if a condition did not hold.

local actions = {}

-- HOLD <round key> <shard>: one more lease holds the shard.
function actions.HOLD(round, shard)
  redis.call('HINCRBY', round .. ':holders', shard, 1)
  redis.call('ZREM', round .. ':free', shard)
end

-- FREE <round key> <shard>: one lease less holds it; with no other holder and no accepted delta it can be handed out.
function actions.FREE(round, shard)
  if redis.call('HINCRBY', round .. ':holders', shard, -1) > 0 then
    return
  end
  redis.call('HDEL', round .. ':holders', shard)
  if redis.call('HEXISTS', round .. ':accepted', shard) == 0 then
    redis.call('ZADD', round .. ':free', shard, shard)
  end
end

-- HDELEQ <key> <field> <value>: delete the field if it still has this value.
function actions.HDELEQ(key, field, value)
  if redis.call('HGET', key, field) == value then
    redis.call('HDEL', key, field)
  end
end

for _, condition in ipairs(cjson.decode(ARGV[1])) do
  local expected = table.remove(condition)
  local found = redis.call(unpack(condition))
  if expected == cjson.null then
    expected = false
  end
  if found ~= false then
    found = tostring(found)
  end
  if found ~= expected then
    return 0
  end
end

for _, write in ipairs(cjson.decode(ARGV[2])) do
  local action = actions[write[1]]
  if action then
    action(unpack(write, 2))
  else
    redis.call(unpack(write))
  end
end
return 1
