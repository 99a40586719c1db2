"""Does bypassing help, and how much? The protocol, fixed before the runs that count; `protocol.toml` has its numbers.

Tasks: one half is searched for settings, the other is run once with what the search froze. Both hold regressions and
classifications; data and nets of the held-out half were not looked at before. Only the digits occur in both, with
different nets. The search draws its weights and minibatches from other seeds than the verdict. It had four rounds. What the
second had frozen was run on the held-out half, so that this half was known to the third, if not chosen by: "fresh" tasks
came in with it, on which nothing had been run before, and "unseen" ones with the fourth. Each of these sets holds a net with
a smooth activation, in which no unit died.

Arms: all start from the same θ* of a seed, with the state of Adam, take the same minibatches and the same number of
steps (a step of SAM takes two gradients, and counts as one). The learning rate stays as before θ* and falls to 0 over
the last quarter, for every arm but "restarts", three half cosines from twice the rate, and "cosine", one over all steps,
which came in with the second round of the search. Every bypass begins at θ* and is over when the rate begins to fall, or
soon after, but for candidates of that round.

Equal wall time: the step of each kind is timed on one model, alternating in one run; what a whole run of an arm costs over
plain training follows from the lengths of its phases. Bypasses and SAM run once more with as many steps fewer.
The steps of a probe (20 for each candidate) and the look for stuck channels (one gradient over the training set) are in no
budget; where they find nothing to bypass, the seed trains on, with equal wall time for all steps.

Measure: the loss over the whole training set after the last step, in evaluation mode; losses below 1e-7 count as that.
The best plain arm of a task is the one with the lowest geometric mean over the seeds: one arm for all seeds of the task.
An arm's ratio is its loss over the best plain arm's, seed by seed; over several tasks each task counts the same. The
interval is a bootstrap over seeds within tasks, 95 %. A seed is won below a ratio of 0.999 and lost above 1.001. What
accept= promises is compared with `continue`, seed by seed: what the same training would have come to.

The goal for the frozen preset on the held-out half, the fresh and the unseen tasks: a ratio of 0.90 or less, won in 70 %
of the seeds or more, lost in 10 % or fewer, and with accept= no seed more than 1 % above plain training.
"""
