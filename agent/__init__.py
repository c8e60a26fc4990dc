"""The agent of one node: it looks after the sessions that live there, or sleep in its store.

Its words, besides those of `lzy.checkpoint`:

session     a process that lzy looks after under a name, running or asleep
record      what the agent keeps of a session, in SQLite (`state`)
state       running, dozing, hibernating, hibernated, waking, ended or failed
operation   one piece of work on a session, in a forked child of the agent (`operations`); at most
            one at a time for each session
intent      an operation's name in the record from before it begins until it has been finished or
            undone; what is found of it at a start is repaired (`repair`)
reading     what /proc tells of a session at one moment (`readings`)
verdict     what one probe makes of two readings: in use, or not, and why (`probes`)
arrival     a session that another node brings: offered, accepting, then accepted or refused
peer        the daemon at the other end of a TLS connection, by what its certificate says
event       one line of the node's history: what happened to which session, and who wanted it

Data flows one way: requests (`api`) → `node` → `operations` → the engine. `client` is what others
use to talk to an agent.
"""
