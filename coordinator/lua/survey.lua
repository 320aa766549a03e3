-- What there is to do, as one moment shows it; it changes nothing.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  worker id
-- ARGV[3]  time since when who was told that there is no work counts as idle
-- Returns {number of idle workers, number of live leases, fields and values of the worker's score,
--          {id, 1 if it grants leases or 0 if it is paused, free shards, live leases, told_tokens, told_seconds,
--           told_shards} for each open round, oldest first}.

local prefix = ARGV[1]
local granting, open, live = {}, {}, 0
for _, id in ipairs(redis.call('ZRANGE', prefix .. 'rounds:open', 0, -1)) do
  granting[id] = 1
end
for _, id in ipairs(redis.call('ZRANGE', prefix .. 'rounds:unfinished', 0, -1)) do
  local round = prefix .. 'round:' .. id
  local about = redis.call('HMGET', round, 'state', 'shards', 'next', 'told_tokens', 'told_seconds', 'told_shards')
  local leased = redis.call('ZCARD', round .. ':expiry')
  live = live + leased
  if about[1] == 'open' then
    local free = redis.call('ZCARD', round .. ':free') + tonumber(about[2]) - tonumber(about[3])
    open[#open + 1] = {id, granting[id] or 0, free, leased, about[4] or '0', about[5] or '0', about[6] or '0'}
  end
end
local idle = redis.call('ZCOUNT', prefix .. 'idle', ARGV[3], '+inf')
return {idle, live, redis.call('HGETALL', prefix .. 'worker:' .. ARGV[2] .. ':score'), open}
