"""Where records wait, and how they leave: the delivery protocol.

A record is in exactly one place at any time: in its key's *buffer*, in a sealed *batch*, or, after the acknowledgement, in a
file or among the dead letters. The steps, each safe to arrive twice:

    push         appends a chunk to a buffer; remembers the push's id
    seal         turns a buffer into an immutable batch, under an id chosen before
    claim        takes a batch for delivery, for as long as a lease lasts; gives a fencing token
    plan         stores once how the batch is cut into units
    acknowledge  after a unit's files are durable: its dead letters stored, the unit marked, the batch removed when complete
    release      gives a batch back

A process that dies before `acknowledge` leaves the batch to the next one, which reads the same chunks and writes the same
files under the same names; after it, nothing is left to do. A run that was paused past its lease holds a stale token and is
refused. Nothing is read destructively.

`protocol` says what a buffer is, `redis` and `memory` are the two that exist, `connect` opens the first with start-up checks,
`embedded` runs a Redis server of our own, `lease` keeps claims alive while a run works. Nothing here knows what a record is.
"""
