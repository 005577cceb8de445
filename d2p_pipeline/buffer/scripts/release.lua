-- Gives a claimed batch back, so that the next run need not wait for the lease to end.
--
-- KEYS  1 lock  string  the lease
-- ARGV  1 owner
-- Returns 1 when the lease was ours, else 0.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
