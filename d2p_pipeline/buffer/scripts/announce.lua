-- Says which files an attempt at a unit is about to write, before it writes any. An attempt that died may have written others:
-- its settings, its software or the user's function were different. Whoever comes after it must remove those, and must not
-- write other content under their names, which the earlier attempt would overwrite if it were only paused.
--
-- KEYS  1 meta  hash  the batch; files:<unit> the newest attempt's files, strays:<unit> those of earlier ones that are none of
--                     them: JSON objects, path to MD5; keep: how long the hash outlives the batch
-- ARGV  1 fencing token   2 unit number   3 JSON object, path to MD5   4 seconds to keep the hash where there are strays
-- Returns {'announced', stray...}; {'contested'} when an earlier attempt announced other content under one of the paths; or
-- {'stale'} when the batch is delivered or another run has taken it. The latter two change nothing.
--
-- HDEL comes first: Redis allows it, and the writes that follow it, even when it is out of memory.

local files, strays = 'files:' .. ARGV[2], 'strays:' .. ARGV[2]
local meta = redis.call('HMGET', KEYS[1], 'state', 'token', files, strays)
if not meta[1] or meta[1] == 'done' or meta[2] ~= ARGV[1] then
  return {'stale'}
end
local wanted = cjson.decode(ARGV[3])
local left, answer = {}, {'announced'}
for _, earlier in ipairs({meta[3] or '{}', meta[4] or '{}'}) do
  for path, md5 in pairs(cjson.decode(earlier)) do
    if not wanted[path] then
      left[path] = md5
      answer[#answer + 1] = path
    elseif wanted[path] ~= md5 then
      return {'contested'}
    end
  end
end
redis.call('HDEL', KEYS[1], strays)
redis.call('HSET', KEYS[1], files, ARGV[3])
if #answer > 1 then
  redis.call('HSET', KEYS[1], strays, cjson.encode(left), 'keep', ARGV[4])
end
return answer
