"""The migrator: decides where sessions live, and when they doze, hibernate, wake and move.

Decisions are pure functions of facts: no input, no output, no clock. The same facts give the same
decisions, today, in a replay, and in `lzy simulate`, which runs months in seconds through them.

session     a process tree that lzy looks after, wherever it is, awake or asleep
node        a machine with an agent
verdict     what one probe says of a session: active or idle, and why
idle        all verdicts idle, over a whole window, seen twice
gap         the time between two activities of a session
window      how long a gap must last until something is done about it
share       the part of a node that a session holds: the largest of its CPU, memory and GPU shares
step        what is done to an idle session: give its GPU back, doze, hibernate
break-even  the time of holding a share that costs as much as one step and the way back

`fleet`, `reading`, `moves`, `loop`, `api`, `join` and `service` are around that in a fleet that
runs: they ask agents, tell them, and answer for all of them.

Data flows one way: `facts` (what is known) → `windows`, `idleness` (one session's next step),
`placement` (one session's node) → `policy` (what to do now, fleet-wide) → `record` (why it was
done). `traces` and `simulate` feed them with weeks of made or recorded sessions. docs/policy.md
says why the rules are as they are.
"""
