"""Reads and compares answers in mathematics; docs/grading.md has the rules.

box          the last box of a response
latex        text to tokens, in which the many spellings of a sign are one
cursor       where a reader is in the tokens; the nodes of a tree; numbers
expression   tokens to a tree of sums, products, powers and functions
words        units, number words, and words that change a meaning
quantity     currencies, units and stated bases around an expression
answer       tokens to the structure around expressions: lists, sets, intervals, matrices, relations
value        whether two expressions have the same value
reals        sets of real numbers: intervals, unions, inequalities
equal        whether two answers are equal
checker      what the grader calls, here and in its worker processes
"""
