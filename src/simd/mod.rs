//! Inner loops, one table of functions for each instruction set, chosen once at run time.
