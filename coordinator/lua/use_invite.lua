-- Use an invite for one worker; the same worker uses it once, however often it asks.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  invite id       ARGV[3]  worker id
-- Returns 1 where the worker may join with it, 0 where it is withdrawn or used up.

local users = ARGV[1] .. 'invite:' .. ARGV[2] .. ':users'
if redis.call('SISMEMBER', users, ARGV[3]) == 1 then
  return redis.call('HEXISTS', ARGV[1] .. 'invites', ARGV[2])
end
local left = redis.call('HGET', ARGV[1] .. 'invites:left', ARGV[2])
if not left or tonumber(left) < 1 then
  return 0
end
redis.call('HINCRBY', ARGV[1] .. 'invites:left', ARGV[2], -1)
redis.call('SADD', users, ARGV[3])
return 1
