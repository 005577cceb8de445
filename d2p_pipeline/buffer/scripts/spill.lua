-- Lets go of a queue's oldest letters, which are in a durable file now.
--
-- KEYS  1 dlq     list  dead letters
--       2 state   hash  version grows whenever letters leave their places
--       3 intent  hash  the replay under way
--       4 files   hash  name of a file to what is in it
-- ARGV  1 name of the file   2 the version under which its letters were read   3 what is in it   4 how many letters
-- Returns 'spilled' (now or by an earlier arrival), 'busy' (a replay is under way) or 'moved' (the letters are elsewhere).
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory.

if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 then
  return 'spilled'
end
if redis.call('EXISTS', KEYS[3]) == 1 then
  return 'busy'
end
if (redis.call('HGET', KEYS[2], 'version') or '0') ~= ARGV[2] then
  return 'moved'
end
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[3])
redis.call('LTRIM', KEYS[1], ARGV[4], -1)
redis.call('HINCRBY', KEYS[2], 'version', 1)
return 'spilled'
