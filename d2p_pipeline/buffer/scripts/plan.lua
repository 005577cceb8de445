-- Stores a batch's unit plan once: whoever comes second, or again, gets the first one's.
--
-- KEYS  1 meta  hash  the batch
-- ARGV  1 the plan: JSON array of [first chunk, one past the last chunk]
-- Returns the plan in force, or false when the batch is gone.

local plan = redis.call('HGET', KEYS[1], 'plan')
if plan or redis.call('EXISTS', KEYS[1]) == 0 then
  return plan
end
redis.call('HDEL', KEYS[1], 'plan')
redis.call('HSET', KEYS[1], 'plan', ARGV[1])
return ARGV[1]
