-- Takes a batch for delivery, or renews a claim. The token grows with every new holder and fences out the earlier ones.
--
-- KEYS  1 lock  string  the owner, for as long as the lease lasts
--       2 meta  hash    the batch; field token is the newest fencing token
-- ARGV  1 owner, unique to this claim   2 lease in ms   3 the token to renew, or 0 to take   4 the newest format we know
-- Returns {'held', token} when the batch is ours; {'busy', 0}, {'stale', 0}, {'done', 0} or {'gone', 0} when it is not;
-- {'newer', format} when a later version sealed it.
--
-- PERSIST changes nothing, but it is a write that Redis allows when it is out of memory, and then it allows the others.

local state = redis.call('HGET', KEYS[2], 'state')
if not state then
  return {'gone', 0}
elseif state == 'done' then
  return {'done', 0}
end

local format = tonumber(redis.call('HGET', KEYS[2], 'format') or 1)
if format > tonumber(ARGV[4]) then
  return {'newer', format}
end

local token = redis.call('HGET', KEYS[2], 'token')
local owner = redis.call('GET', KEYS[1])
redis.call('PERSIST', KEYS[2])
if ARGV[3] ~= '0' then
  -- A lease that ran out is renewed as long as nobody else has taken the batch.
  if token ~= ARGV[3] then
    return {'stale', 0}
  end
elseif owner and owner ~= ARGV[1] then
  return {'busy', 0}
elseif not owner then
  token = redis.call('HINCRBY', KEYS[2], 'token', 1)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {'held', tonumber(token)}
