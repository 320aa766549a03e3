-- Lease neighbouring free shards of the first candidate that has any, or a straggler's once more, or hand a worker its
-- live lease again. One whose delta is on its way stands aside for another, and no worker has more than these two.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  worker id
-- ARGV[3]  id for a new lease       ARGV[4]  now, Unix seconds
-- ARGV[5]  JSON list of candidates, best first: {round, shards (most of one lease), rank (of the tier, or 0), shard_s
--          (seconds that one shard should take), known (whether that was measured), copies, fitting (most shards that
--          the worker has time for)}
-- ARGV[6]  time before which who was told that there is no work counts no longer as idle
-- ARGV[7]  the lease whose delta the worker delivers now, or an empty string
-- Returns {1, fields and values of the lease...}, or {0, when the first live lease of the candidates should be over, or
-- an empty string}, or {-1} where the worker has two leases.

local prefix, worker, new_lease, now = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local candidates = cjson.decode(ARGV[5])
local SCANNED = 64 -- stragglers that are looked at
local held = redis.call('HGET', prefix .. 'live', worker)
local delivers = held and held == ARGV[7]

local function whole(number)
  return string.format('%d', number)
end

local function span(first, count)
  local shards = {}
  for shard = first, first + count - 1 do
    shards[#shards + 1] = whole(shard)
  end
  return shards
end

local function answer(lease_key)
  redis.call('ZREM', prefix .. 'idle', worker)
  local fields = redis.call('HGETALL', lease_key)
  table.insert(fields, 1, 1)
  return fields
end

local function settled(round, shards)
  for _, lease in ipairs(redis.call('HMGET', round .. ':accepted', unpack(shards))) do
    if lease then
      return true
    end
  end
  return false
end

local function grant(candidate, first, count)
  local round, shards, fence = prefix .. 'round:' .. candidate.round, span(first, count), 0
  for _, last in ipairs(redis.call('HMGET', round .. ':fences', unpack(shards))) do
    fence = math.max(fence, tonumber(last or 0))
  end
  local fences = {}
  for _, shard in ipairs(shards) do
    fences[#fences + 1] = shard
    fences[#fences + 1] = whole(fence + 1)
    redis.call('HINCRBY', round .. ':holders', shard, 1)
  end
  redis.call('HSET', round .. ':fences', unpack(fences))
  local lease_key, expected_s = prefix .. 'lease:' .. new_lease, candidate.shard_s * count
  local expires_at = string.format('%.6f', now + tonumber(redis.call('HGET', round, 'lease_s')))
  redis.call('HSET', lease_key, 'lease_id', new_lease, 'fence', whole(fence + 1), 'round_id', candidate.round,
    'shard', whole(first), 'shards', whole(count), 'worker_id', worker, 'state', 'granted', 'granted_at', ARGV[4],
    'expires_at', expires_at, 'expected_s', string.format('%.6f', expected_s), 'rev', '0')
  if candidate.rank > 0 then
    redis.call('HSET', lease_key, 'rank', whole(candidate.rank))
  end
  redis.call('ZADD', round .. ':expiry', expires_at, new_lease)
  redis.call('ZADD', round .. ':eta', string.format('%.6f', now + expected_s), new_lease)
  if delivers then
    redis.call('HSET', prefix .. 'delivering', worker, held)
  end
  redis.call('HSET', prefix .. 'live', worker, new_lease)
  return answer(lease_key)
end

-- An answer may have been lost: the lease that the worker still holds comes first, and lasts anew.
if delivers then
  if redis.call('HEXISTS', prefix .. 'delivering', worker) == 1 then
    return {-1}
  end
elseif held then
  local lease_key = prefix .. 'lease:' .. held
  local about = redis.call('HMGET', lease_key, 'round_id', 'shard', 'shards')
  local round = prefix .. 'round:' .. (about[1] or '')
  local state = redis.call('HGET', round, 'state')
  -- A late submission of somebody else may have settled a shard meanwhile.
  if (state == 'open' or state == 'closing') and not settled(round, span(tonumber(about[2]), tonumber(about[3]))) then
    local expires_at = string.format('%.6f', now + tonumber(redis.call('HGET', round, 'lease_s')))
    redis.call('HSET', lease_key, 'expires_at', expires_at)
    redis.call('HINCRBY', lease_key, 'rev', 1)
    redis.call('ZADD', round .. ':expiry', expires_at, held)
    return answer(lease_key)
  end
end

local granting = {}
for _, candidate in ipairs(candidates) do
  if redis.call('ZSCORE', prefix .. 'rounds:open', candidate.round) then
    granting[#granting + 1] = candidate
  end
end

for _, candidate in ipairs(granting) do
  local round = prefix .. 'round:' .. candidate.round
  local about = redis.call('HMGET', round, 'shards', 'next')
  local shards, next_one = tonumber(about[1]), tonumber(about[2])
  -- Every freed shard was granted before, so all of them lie below `next`, the lowest shard never granted.
  local freed, first, count = redis.call('ZRANGE', round .. ':free', 0, candidate.shards - 1), next_one, 0
  if #freed > 0 then
    first = tonumber(freed[1])
    while count < #freed and tonumber(freed[count + 1]) == first + count do
      count = count + 1
    end
    redis.call('ZREM', round .. ':free', unpack(freed, 1, count))
  end
  if first + count == next_one then
    local more = math.min(candidate.shards - count, shards - next_one)
    redis.call('HINCRBY', round, 'next', more)
    count = count + more
  end
  if count > 0 then
    return grant(candidate, first, count)
  end
end

-- Nothing is free: a copy of the lease that would be over last, where this worker should be faster, and not of its own.
local back
for _, candidate in ipairs(granting) do
  local round = prefix .. 'round:' .. candidate.round
  for _, lease_id in ipairs(redis.call('ZREVRANGE', round .. ':eta', 0, SCANNED - 1)) do
    local lease = redis.call('HMGET', prefix .. 'lease:' .. lease_id, 'shard', 'shards', 'granted_at', 'expected_s',
      'worker_id')
    local first, count = tonumber(lease[1]), tonumber(lease[2])
    local ends_at = tonumber(redis.call('ZSCORE', round .. ':eta', lease_id))
    local slow
    if candidate.known then
      slow = ends_at > now + candidate.shard_s * count
    else
      slow = now > tonumber(lease[3]) + 1.5 * tonumber(lease[4])
    end
    if slow and lease[5] ~= worker and candidate.copies > 1 and count <= candidate.fitting then
      local shards, free_hands = span(first, count), true
      for _, holders in ipairs(redis.call('HMGET', round .. ':holders', unpack(shards))) do
        free_hands = free_hands and tonumber(holders or 0) < candidate.copies
      end
      if free_hands and not settled(round, shards) then
        return grant(candidate, first, count)
      end
    end
  end
  local soonest = redis.call('ZRANGE', round .. ':eta', 0, 0, 'WITHSCORES')[2]
  if soonest and (not back or tonumber(soonest) < tonumber(back)) then
    back = soonest
  end
end

redis.call('ZREMRANGEBYSCORE', prefix .. 'idle', '-inf', '(' .. ARGV[6])
redis.call('ZADD', prefix .. 'idle', ARGV[4], worker)
return {0, back or ''}
