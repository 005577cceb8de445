-- Puts a batch into recovery: its delivery failed after all retries, and it waits for an automatic or a manual attempt.
--
-- KEYS  1 meta  hash    the batch
--       2 lock  string  the lease
--       3 totals  hash  what this key ever accepted, wrote and rejected, and how
-- ARGV  1 fencing token   2 what went wrong
-- Returns how often the batch has failed now, or 0 when it is not this token's to fail (stale, delivered, or failed already).
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory.

local meta = redis.call('HMGET', KEYS[1], 'state', 'token', 'failed_token')
if not meta[1] or meta[1] == 'done' or meta[2] ~= ARGV[1] or meta[3] == ARGV[1] then
  return 0
end
redis.call('HDEL', KEYS[1], 'error')
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'state', 'recovery', 'error', ARGV[2], 'failed_token', ARGV[1],
  'failed_at', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('DEL', KEYS[2])
redis.call('HINCRBY', KEYS[3], 'failures', 1)
return redis.call('HINCRBY', KEYS[1], 'failures', 1)
