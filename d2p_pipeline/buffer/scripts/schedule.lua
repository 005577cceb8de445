-- Puts members into an index. ZREM comes first so that Redis allows the ZADD even when it is out of memory.
--
-- KEYS  1 zset  the index
-- ARGV  score (ms), member, score, member, ..

for i = 1, #ARGV, 2 do
  redis.call('ZREM', KEYS[1], ARGV[i + 1])
  redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1])
end
return #ARGV / 2
