-- Ends the delivery of one unit, after its files are durable: dead letters stored, unit marked, batch removed when complete.
--
-- KEYS  1 meta    hash    the batch
--       2 batch   list    its chunks
--       3 lock    string  the lease
--       4 dlq     list    dead letters
--       5 totals  hash    what this key ever accepted, wrote and rejected, and how
-- ARGV  1 fencing token   2 unit number   3 units in the plan   4 rows in the unit's files
--       5 rejected records   6 files   7 their bytes   8.. the dead letters, where they are kept
-- Returns 'complete' (that was the last unit), 'marked', 'repeated' (marked or complete before: nothing changes now) or
-- 'stale' (another run has taken the batch since).
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory. Only deliveries free memory.

local state = redis.call('HGET', KEYS[1], 'state')
local unit = 'unit:' .. ARGV[2]
if not state or state == 'done' or redis.call('HEXISTS', KEYS[1], unit) == 1 then
  return 'repeated'
end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 'stale'
end

redis.call('HDEL', KEYS[1], unit)
local dead = ARGV[5]
for i = 8, #ARGV do
  redis.call('RPUSH', KEYS[4], ARGV[i])
end
redis.call('HSET', KEYS[1], unit, ARGV[4] .. ' rows, ' .. dead .. ' dead letters')
local rows = redis.call('HINCRBY', KEYS[1], 'rows', ARGV[4])
local dead_letters = redis.call('HINCRBY', KEYS[1], 'dead_letters', dead)
redis.call('HINCRBY', KEYS[5], 'rows', ARGV[4])
redis.call('HINCRBY', KEYS[5], 'dead_letters', dead)
redis.call('HINCRBY', KEYS[5], 'files', ARGV[6])
redis.call('HINCRBY', KEYS[5], 'file_bytes', ARGV[7])
redis.call('HINCRBY', KEYS[5], 'units', 1)
local time = redis.call('TIME')
local sealed_at = tonumber(redis.call('HGET', KEYS[1], 'sealed_at'))
redis.call('HINCRBY', KEYS[5], 'delivery_ms', math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - sealed_at))
if dead ~= '0' then
  redis.call('HINCRBY', KEYS[5], 'rejected', dead)
end
if redis.call('HINCRBY', KEYS[1], 'units_done', 1) < tonumber(ARGV[3]) then
  return 'marked'
end

-- Nobody counted the records of a producer that pushes by itself: they are accepted now that they are known.
local meta = redis.call('HMGET', KEYS[1], 'chunks', 'pushed_chunks', 'records')
if meta[1] ~= meta[2] then
  redis.call('HINCRBY', KEYS[5], 'accepted', rows + dead_letters - tonumber(meta[3]))
end
redis.call('HSET', KEYS[1], 'state', 'done')
redis.call('EXPIRE', KEYS[1], redis.call('HGET', KEYS[1], 'keep') or 3600)
redis.call('DEL', KEYS[2], KEYS[3])
return 'complete'
