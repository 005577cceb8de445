-- Writes down what a replay is about to do with letters of a key, before it does it. Until `take` ends the replay nobody else
-- can change the key's queue, and whoever finds an intent that nobody ends carries it out again: its pushes have ids.
--
-- KEYS  1 state   hash  version grows whenever letters leave their places
--       2 intent  hash  id, body
-- ARGV  1 id of the replay   2 the version under which its letters were read   3 body: which letters, and the pushes
-- Returns 'intended' (now or by an earlier arrival), 'busy' (another replay is under way) or 'moved' (the letters are elsewhere).

local id = redis.call('HGET', KEYS[2], 'id')
if id then
  return id == ARGV[1] and 'intended' or 'busy'
end
if (redis.call('HGET', KEYS[1], 'version') or '0') ~= ARGV[2] then
  return 'moved'
end
redis.call('HSET', KEYS[2], 'id', ARGV[1], 'body', ARGV[3])
return 'intended'
