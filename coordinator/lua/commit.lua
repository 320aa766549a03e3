-- Compare and set: all writes are made, or none.
--
-- ARGV[1]  JSON list of conditions [command, argument..., expected]: the command's reply must equal `expected`
--          (a string, or null for a missing value, or a list of both)
-- ARGV[2]  JSON list of writes [command, argument...]: commands of the server, or one of the three actions below
-- Returns 1 if the writes were made, 0 if a condition did not hold.

local actions = {}

-- HOLD <round key> <shard> <n>: one more lease holds these n shards.
function actions.HOLD(round, first, count)
  for number = tonumber(first), first + count - 1 do
    local shard = string.format('%d', number)
    redis.call('HINCRBY', round .. ':holders', shard, 1)
    redis.call('ZREM', round .. ':free', shard)
  end
end

-- FREE <round key> <shard> <n>: one lease less holds these n shards; those with no other holder and no accepted delta
-- can be handed out.
function actions.FREE(round, first, count)
  for number = tonumber(first), first + count - 1 do
    local shard = string.format('%d', number)
    if redis.call('HINCRBY', round .. ':holders', shard, -1) < 1 then
      redis.call('HDEL', round .. ':holders', shard)
      if redis.call('HEXISTS', round .. ':accepted', shard) == 0 then
        redis.call('ZADD', round .. ':free', shard, shard)
      end
    end
  end
end

-- HDELEQ <key> <field> <value>: delete the field if it still has this value.
function actions.HDELEQ(key, field, value)
  if redis.call('HGET', key, field) == value then
    redis.call('HDEL', key, field)
  end
end

local function same(found, expected)
  if expected == cjson.null then
    return found == false
  end
  if type(expected) ~= 'table' then
    return found ~= false and tostring(found) == expected
  end
  for place, value in ipairs(expected) do
    if not same(found[place], value) then
      return false
    end
  end
  return true
end

for _, condition in ipairs(cjson.decode(ARGV[1])) do
  local expected = table.remove(condition)
  if not same(redis.call(unpack(condition)), expected) then
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
