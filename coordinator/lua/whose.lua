-- The worker that a token belongs to.
--
-- ARGV[1]  prefix of all keys       ARGV[2]  sha256 of the token
-- ARGV[3]  now, Unix seconds        ARGV[4]  seconds after which `seen` is written anew
-- Returns the worker's document, or nothing for a token that is unknown or has run out.

local worker = redis.call('HGET', ARGV[1] .. 'tokens', ARGV[2])
if not worker then
  return false
end
local key, now = ARGV[1] .. 'worker:' .. worker, tonumber(ARGV[3])
local found = redis.call('HMGET', key, 'doc', 'token_until', 'seen')
if found[2] and tonumber(found[2]) <= now then
  return false
end
if not found[3] or math.abs(now - tonumber(found[3])) >= tonumber(ARGV[4]) then
  redis.call('HSET', key, 'seen', ARGV[3])
end
return found[1]
