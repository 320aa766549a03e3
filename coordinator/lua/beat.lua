-- The heartbeat of a lease that is well under way: token, worker, lease and round in one go.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  sha256 of the token
-- ARGV[3]  id of the lease          ARGV[4]  fence
-- ARGV[5]  now, Unix seconds        ARGV[6]  training steps done
-- ARGV[7]  seconds after which `seen` is written anew
-- ARGV[8] to ARGV[11]  loss, tokens per second, gradient norm, joules so far: each as it is stored, or empty
-- Returns {when the lease runs out, its life without a heartbeat}, or nothing and changes nothing: this is for
-- `leases.step` to judge.

local prefix, now = ARGV[1], tonumber(ARGV[5])

local worker = redis.call('HGET', prefix .. 'tokens', ARGV[2])
if not worker or redis.call('ZSCORE', prefix .. 'workers:banned', worker) then
  return false
end
local worker_key = prefix .. 'worker:' .. worker
local about = redis.call('HMGET', worker_key, 'token_until', 'seen')
if about[1] and tonumber(about[1]) <= now then
  return false
end

local lease_key = prefix .. 'lease:' .. ARGV[3]
local lease = redis.call('HMGET', lease_key, 'worker_id', 'fence', 'state', 'round_id', 'shard', 'shards', 'step',
  'granted_at', 'expected_s', 'trained_for')
if lease[1] ~= worker or lease[2] ~= ARGV[4] or lease[3] ~= 'granted' or lease[10] then
  return false
end
local round = prefix .. 'round:' .. lease[4]
local facts = redis.call('HMGET', round, 'state', 'lease_s', 'steps')
if (facts[1] ~= 'open' and facts[1] ~= 'closing') or not facts[3] then
  return false
end
local first, count, shards = tonumber(lease[5]), tonumber(lease[6] or 1), {}
for shard = first, first + count - 1 do
  shards[#shards + 1] = string.format('%d', shard)
end
for _, settled in ipairs({':accepted', ':late'}) do
  for _, by in ipairs(redis.call('HMGET', round .. settled, unpack(shards))) do
    if by then
      return false
    end
  end
end

local done = math.max(tonumber(lease[7] or 0), tonumber(ARGV[6]))
local expires_at = string.format('%.17g', now + tonumber(facts[2]))
local ends_at = now + tonumber(lease[9] or 0)
if done > 0 then
  ends_at = now + math.max(0, tonumber(facts[3]) * count - done) * (now - tonumber(lease[8])) / done
end
redis.call('HSET', lease_key, 'expires_at', expires_at, 'step', string.format('%d', done))
for place, name in ipairs({'loss', 'tokens_per_s', 'grad_norm', 'energy_j'}) do
  if ARGV[7 + place] ~= '' then
    redis.call('HSET', lease_key, name, ARGV[7 + place])
  end
end
redis.call('HINCRBY', lease_key, 'rev', 1)
redis.call('ZADD', round .. ':expiry', expires_at, ARGV[3])
redis.call('ZADD', round .. ':eta', string.format('%.17g', ends_at), ARGV[3])
if not about[2] or math.abs(now - tonumber(about[2])) >= tonumber(ARGV[7]) then
  redis.call('HSET', worker_key, 'seen', ARGV[5])
end
return {expires_at, facts[2]}
