-- Takes dead letters out of a key's queue: discarded by a person, or replayed (pushed elsewhere before this).
--
-- KEYS  1 dlq     list  dead letters
--       2 totals  hash  what this key ever accepted, wrote, rejected and discarded
-- ARGV  1 1 when they are discarded, 0 when they were replayed and so counted again   2.. the letters, as stored
-- Returns how many were there. A second arrival finds none: every letter has an id of its own.

local removed = 0
for i = 2, #ARGV do
  removed = removed + redis.call('LREM', KEYS[1], 1, ARGV[i])
end
if removed > 0 then
  redis.call('HINCRBY', KEYS[2], 'dead_letters', -removed)
  if ARGV[1] == '1' then
    redis.call('HINCRBY', KEYS[2], 'discarded', removed)
  else
    redis.call('HINCRBY', KEYS[2], 'accepted', -removed)
  end
end
return removed
