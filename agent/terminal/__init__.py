"""Terminals that lzy keeps for sessions, so that they outlive whoever looks at them.

keeper      two processes that hold one terminal's master (`keeper`): a *guard*, which is the
            program's parent and starts the other again, and a *host*, which serves consoles
console     whoever is connected to a terminal at present: `lzy console`, several at once (`client`)
screen      what the terminal shows, and some of what has scrolled off (`screen`)
hold        input is kept back, while the session hibernates or is on its way

What keepers and consoles say to each other are `frames`. The files that tell of kept terminals are
the engine's (`lzy.checkpoint.kept`), since images of what runs on them must say so.
"""
