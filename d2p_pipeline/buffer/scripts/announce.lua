-- Says which files an attempt at a unit is about to write, before it writes any. An attempt that died may have written others:
-- its settings, its software or the user's function were different. Whoever comes after it must remove those. And an earlier
-- attempt may only be paused, about to write or to remove: a name is shared with it only for the same content, and a name that
-- was to be removed once is nobody's any more.
--
-- KEYS  1 meta  hash  the batch; files:<unit> the newest attempt's files, strays:<unit> those of earlier ones that are none of
--                     them: JSON objects, path to MD5; keep: how long the hash outlives the batch
-- ARGV  1 fencing token   2 unit number   3 JSON object, path to MD5   4 seconds to keep the hash where there are strays
--       5 1 when the names are this attempt's alone, else 0
-- Returns {'announced', stray...}; {'contested'} when another attempt may have written or removed one of the paths; or
-- {'stale'} when the batch is delivered or another run has taken it. The latter two change nothing.
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory.

local files, strays = 'files:' .. ARGV[2], 'strays:' .. ARGV[2]
local meta = redis.call('HMGET', KEYS[1], 'state', 'token', files, strays)
if not meta[1] or meta[1] == 'done' or meta[2] ~= ARGV[1] then
  return {'stale'}
end
local wanted = cjson.decode(ARGV[3])
local left, answer = cjson.decode(meta[4] or '{}'), {'announced'}
for path in pairs(left) do
  if wanted[path] and ARGV[5] == '0' then
    return {'contested'}
  end
end
for path, md5 in pairs(cjson.decode(meta[3] or '{}')) do
  if not wanted[path] then
    left[path] = md5
  elseif wanted[path] ~= md5 and ARGV[5] == '0' then
    return {'contested'}
  end
end
for path in pairs(wanted) do
  left[path] = nil
end
for path in pairs(left) do
  answer[#answer + 1] = path
end
redis.call('HDEL', KEYS[1], strays)
redis.call('HSET', KEYS[1], files, ARGV[3])
if #answer > 1 then
  redis.call('HSET', KEYS[1], strays, cjson.encode(left), 'keep', ARGV[4])
end
return answer
