-- Takes letters out of a key's queue or out of one of its files: replayed, by an intent whose pushes are stored, or discarded.
--
-- KEYS  1 dlq     list    dead letters
--       2 totals  hash    what this key ever accepted, wrote, rejected and discarded
--       3 intent  hash    the replay under way
--       4 gone    string  bits of the file's letters, set where they are gone
--       5 state   hash    version grows whenever letters leave their places; the last step's id and how many it took
-- ARGV  1 id of this step; of the intent, where it ends one   2 'replayed' or 'discarded'   3 version, where it ends no intent
--       4 'queue' or 'file'   5.. places of the letters, counted from 0
-- Returns {'taken', how many} (now or by an earlier arrival), {'busy', 0} (a replay is under way) or {'moved', 0}.
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory.

local state = redis.call('HMGET', KEYS[5], 'step', 'taken', 'version')
if state[1] == ARGV[1] then
  return {'taken', tonumber(state[2])}
end
local intent = redis.call('HGET', KEYS[3], 'id')
if ARGV[2] == 'replayed' then
  if intent ~= ARGV[1] then
    return {'taken', 0} -- another process has ended it
  end
elseif intent then
  return {'busy', 0}
elseif (state[3] or '0') ~= ARGV[3] then
  return {'moved', 0}
end

redis.call('HDEL', KEYS[5], 'step')
local taken = 0
if ARGV[4] == 'file' then
  for i = 5, #ARGV do
    taken = taken + 1 - redis.call('SETBIT', KEYS[4], ARGV[i], 1)
  end
else
  local mark = 'taken by ' .. ARGV[1]
  for i = 5, #ARGV do
    redis.call('LSET', KEYS[1], ARGV[i], mark)
  end
  taken = redis.call('LREM', KEYS[1], 0, mark)
end

redis.call('HINCRBY', KEYS[2], 'dead_letters', -taken)
if ARGV[2] == 'discarded' then
  redis.call('HINCRBY', KEYS[2], 'discarded', taken)
else
  redis.call('HINCRBY', KEYS[2], 'accepted', -taken) -- the pushes have counted them again
  redis.call('DEL', KEYS[3])
end
redis.call('HINCRBY', KEYS[5], 'version', 1)
redis.call('HSET', KEYS[5], 'step', ARGV[1], 'taken', taken)
return {'taken', taken}
