-- Forgets a file of dead letters all of which are gone, after the file has been removed.
--
-- KEYS  1 files  hash    name of a file to what is in it
--       2 gone   string  bits of the file's letters, set where they are gone
-- ARGV  1 name of the file   2 how many letters it had
-- Returns 1 when it is forgotten now.

if redis.call('BITCOUNT', KEYS[2]) < tonumber(ARGV[2]) then
  return 0
end
redis.call('DEL', KEYS[2])
return redis.call('HDEL', KEYS[1], ARGV[1])
