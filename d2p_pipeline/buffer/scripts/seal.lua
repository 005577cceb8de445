-- Turns a buffer into an immutable batch: one RENAME, whatever the buffer's size.
--
-- KEYS  1 data   list  the buffer
--       2 stats  hash  its counts
--       3 batch  list  the batch's chunks; must not exist
--       4 meta   hash  what is known of the batch; outlives it for an hour, so a late second arrival finds the id used
--       5 totals  hash  what this key ever accepted, wrote and rejected, and how
-- ARGV  1 why the buffer is sealed   2 when that was ordered, in ms by this clock
-- Returns 1 when the batch exists or existed, 0 when the buffer is empty, or when the order is so old that nobody knows whether
-- it has come before: a batch under the same id would take the names of files that are delivered.
--
-- RENAME comes first: Redis refuses it never for want of memory, and allows the writes that follow it.

if redis.call('EXISTS', KEYS[4]) == 1 then
  return 1
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if now - ARGV[2] > 1800000 then
  return 0
end
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then
  return 0
end
if kind ~= 'list' then
  return redis.error_reply('D2PTYPE ' .. KEYS[1] .. ' is a ' .. kind .. ', not a list of chunks; rename or delete it')
end

redis.call('RENAME', KEYS[1], KEYS[3])
local stats = redis.call('HMGET', KEYS[2], 'records', 'bytes', 'chunks', 'first')
redis.call('DEL', KEYS[2])
redis.call('HINCRBY', KEYS[5], 'sealed:' .. ARGV[1], 1)
redis.call('HSET', KEYS[4],
  'format', 1, 'state', 'open', 'reason', ARGV[1], 'sealed_at', now, 'first', stats[4] or now,
  'chunks', redis.call('LLEN', KEYS[3]),
  'records', stats[1] or 0, 'bytes', stats[2] or 0, 'pushed_chunks', stats[3] or 0,
  'token', 0, 'requests', 0, 'units_done', 0, 'rows', 0, 'dead_letters', 0)
return 1
