-- Appends chunks to keys' buffers and dead letters to their queues, in one step: all pushes or none.
--
-- KEYS  of each push five:
--       1 data    list    the buffer
--       2 stats   hash    records, bytes, chunks, first (ms) of the current buffer
--       3 dlq     list    dead letters
--       4 totals  hash    what this key ever accepted, wrote and rejected
--       5 pushed  string  remembers this push's id, so that its second arrival changes nothing
-- ARGV  of each push six or more:
--       1 seconds to remember the id   2 records in the chunk   3 their raw bytes   4 the chunk, or ''   5 rejected records
--       6 the number of dead letters that follow, where they are kept
--       and at the end, if it is known: when the pushes were sent first, in ms by this clock or a little earlier
-- Returns of each push {records, bytes, fresh}: the buffer's size afterwards; fresh = 1 when this push began the buffer.
-- Errors: FOREIGN where another program's value has a name that a push needs; LATE where so much time has gone since the pushes
-- were sent first that an earlier arrival may be forgotten.
--
-- Types are looked at before anything is written: what was written before an error would stay. Of what is written SET comes
-- first: it is what Redis refuses when it is out of memory, before anything else has changed. Whether the push is stored already
-- is only read, so that its second arrival is no refusal either.
--
-- Each command costs a call from Lua, and one more in the append-only file if it writes: hence HSET, and no HINCRBY of each field.

local function foreign(name, wanted)
  local found = redis.call('TYPE', name).ok
  if found ~= wanted and found ~= 'none' then
    return redis.error_reply('FOREIGN ' .. name .. ' is a ' .. found .. ', it should be a ' .. wanted)
  end
end

local after, shortest = 1, math.huge
for first = 1, #KEYS, 5 do
  local refusal = foreign(KEYS[first + 1], 'hash') or foreign(KEYS[first + 3], 'hash')
    or ARGV[after + 3] ~= '' and foreign(KEYS[first], 'list')
    or ARGV[after + 5] ~= '0' and foreign(KEYS[first + 2], 'list')
  if refusal then
    return refusal
  end
  shortest = math.min(shortest, ARGV[after])
  after = after + 6 + ARGV[after + 5]
end

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if ARGV[after] and now - ARGV[after] >= shortest * 1000 then
  return redis.error_reply('LATE the push took ' .. now - ARGV[after] .. ' ms')
end

local function push(data, stats, dlq, totals, pushed, at)
  local found = redis.call('HMGET', stats, 'records', 'bytes', 'chunks', 'first')
  local records, bytes = tonumber(found[1] or 0), tonumber(found[2] or 0)
  if redis.call('EXISTS', pushed) == 1 then
    return {records, bytes, 0}
  end
  redis.call('SET', pushed, 1, 'EX', ARGV[at])

  for i = at + 6, at + 5 + ARGV[at + 5] do
    redis.call('RPUSH', dlq, ARGV[i])
  end

  local fresh = 0
  if ARGV[at + 3] ~= '' then
    redis.call('RPUSH', data, ARGV[at + 3])
    fresh = found[4] and 0 or 1
    records, bytes = records + ARGV[at + 1], bytes + ARGV[at + 2]
    -- Redis writes a number with all its digits, where Lua's tostring would make 1e+15 of it.
    redis.call('HSET', stats, 'records', records, 'bytes', bytes, 'chunks', (found[3] or 0) + 1, 'first', found[4] or now)
  end

  local rejected = ARGV[at + 4]
  redis.call('HINCRBY', totals, 'accepted', ARGV[at + 1] + rejected)
  if rejected ~= '0' then
    redis.call('HINCRBY', totals, 'dead_letters', rejected)
    redis.call('HINCRBY', totals, 'rejected', rejected)
  end
  return {records, bytes, fresh}
end

local replies, at = {}, 1
for first = 1, #KEYS, 5 do
  replies[#replies + 1] = push(KEYS[first], KEYS[first + 1], KEYS[first + 2], KEYS[first + 3], KEYS[first + 4], at)
  at = at + 6 + ARGV[at + 5]
end
return replies
