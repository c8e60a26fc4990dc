"""The engine: a running process into an image, and back.

The words, each with one meaning throughout lzy:

VMA         a mapped range of a process's addresses
page        the MMU's unit, 4096 bytes
window      an aligned run of up to 64 pages, the grid on which memory is cut into chunks
chunk       content-addressed bytes: the stored pages of one window
pack        one file (object) that holds many chunks
space       what pages belong to: space 0 is the address space, others are contents of
            memory files, deleted files and the like
manifest    what an image holds, in order
image       one dumped process
dump        process to image; a *checkpoint* is a dump that leaves the process running
restore     image to process, *eager* (all memory first) or *lazy* (pages as they are touched)
tracee      the process being traced; to *seize* is to attach to it without stopping it
stub        the few bytes of machine code that lzy runs inside a tracee
pager       the process that serves the faults of a lazily restored one
description an open file description: what several descriptors made by dup(2) share

Data flows one way: `dump` reads a process through `tracee`, `proc` and `resources` and hands
pages to `store`; `restore` goes back the same way and leaves a `pager` behind.
"""
