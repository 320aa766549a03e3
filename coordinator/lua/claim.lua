-- Lease the lowest free shard of the oldest open round, or hand a worker its live lease again.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  worker id
-- ARGV[3]  id for a new lease       ARGV[4]  now, Unix seconds
-- Returns {1, fields and values of the lease...}, or {0, number of open rounds}.

local prefix, worker, new_lease, now = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local open = redis.call('ZRANGE', prefix .. 'rounds:open', 0, -1)

local function answer(lease_key)
  local fields = redis.call('HGETALL', lease_key)
  table.insert(fields, 1, 1)
  return fields
end

-- An answer may have been lost: the lease that the worker still holds comes first, and lasts anew.
for _, id in ipairs(open) do
  local round = prefix .. 'round:' .. id
  local lease_id = redis.call('HGET', round .. ':live', worker)
  if lease_id then
    local lease_key = prefix .. 'lease:' .. lease_id
    local shard = redis.call('HGET', lease_key, 'shard')
    -- A late submission of somebody else may have settled the shard meanwhile.
    if shard and redis.call('HEXISTS', round .. ':accepted', shard) == 0 then
      local expires_at = string.format('%.6f', now + tonumber(redis.call('HGET', round, 'lease_s')))
      redis.call('HSET', lease_key, 'expires_at', expires_at)
      redis.call('HINCRBY', lease_key, 'rev', 1)
      redis.call('ZADD', round .. ':expiry', expires_at, lease_id)
      return answer(lease_key)
    end
  end
end

for _, id in ipairs(open) do
  local round = prefix .. 'round:' .. id
  local about = redis.call('HMGET', round, 'shards', 'next', 'lease_s')
  -- Every freed shard was granted before, so all of them lie below `next`, the lowest shard never granted.
  local shard = redis.call('ZPOPMIN', round .. ':free')[1]
  if not shard and tonumber(about[2]) < tonumber(about[1]) then
    shard = about[2]
    redis.call('HINCRBY', round, 'next', 1)
  end
  if shard then
    local fence = redis.call('HINCRBY', round .. ':fences', shard, 1)
    local expires_at = string.format('%.6f', now + tonumber(about[3]))
    local lease_key = prefix .. 'lease:' .. new_lease
    redis.call('HSET', lease_key, 'lease_id', new_lease, 'fence', fence, 'round_id', id, 'shard', shard,
      'worker_id', worker, 'state', 'granted', 'granted_at', ARGV[4], 'expires_at', expires_at, 'rev', 0)
    redis.call('HINCRBY', round .. ':holders', shard, 1)
    redis.call('ZADD', round .. ':expiry', expires_at, new_lease)
    redis.call('HSET', round .. ':live', worker, new_lease)
    return answer(lease_key)
  end
end
return {0, #open}
