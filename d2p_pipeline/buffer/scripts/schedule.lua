-- Puts one member into an index. ZREM comes first so that Redis allows the ZADD even when it is out of memory.
--
-- KEYS  1 zset  the index
-- ARGV  1 score (ms)   2 member

redis.call('ZREM', KEYS[1], ARGV[2])
return redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
