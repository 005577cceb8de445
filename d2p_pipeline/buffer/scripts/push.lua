-- Appends one chunk to a key's buffer and its dead letters to the key's queue, in one step.
--
-- KEYS  1 data    list    the buffer
--       2 stats   hash    records, bytes, chunks, first (ms) of the current buffer
--       3 dlq     list    dead letters
--       4 totals  hash    what this key ever accepted, wrote and rejected
--       5 pushed  string  remembers this push's id, so that its second arrival changes nothing
-- ARGV  1 seconds to remember the id   2 records in the chunk   3 their raw bytes   4 the chunk, or ''   5 rejected records
--       6.. their dead letters, where they are kept
-- Returns {records, bytes, fresh}: the buffer's size afterwards; fresh = 1 when this push began the buffer.
--
-- SET comes first: it is what Redis refuses when it is out of memory, before anything else has changed.

local function size(fresh)
  local stats = redis.call('HMGET', KEYS[2], 'records', 'bytes')
  return {tonumber(stats[1] or 0), tonumber(stats[2] or 0), fresh}
end

if not redis.call('SET', KEYS[5], 1, 'NX', 'EX', ARGV[1]) then
  return size(0)
end

for i = 6, #ARGV do
  redis.call('RPUSH', KEYS[3], ARGV[i])
end

local fresh = 0
if ARGV[4] ~= '' then
  local time = redis.call('TIME')
  redis.call('RPUSH', KEYS[1], ARGV[4])
  fresh = redis.call('HSETNX', KEYS[2], 'first', time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('HINCRBY', KEYS[2], 'records', ARGV[2])
  redis.call('HINCRBY', KEYS[2], 'bytes', ARGV[3])
  redis.call('HINCRBY', KEYS[2], 'chunks', 1)
end

redis.call('HINCRBY', KEYS[4], 'accepted', tonumber(ARGV[2]) + tonumber(ARGV[5]))
redis.call('HINCRBY', KEYS[4], 'dead_letters', ARGV[5])
if ARGV[5] ~= '0' then
  redis.call('HINCRBY', KEYS[4], 'rejected', ARGV[5])
end
return size(fresh)
