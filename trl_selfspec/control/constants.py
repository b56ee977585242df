"""The constants of the controller in one table: what each one means, and what breaks without it.

Values were tuned on simulated machines (tests/control) and on the machines of docs/LOG.md. No constant is a number of
seconds: these are measured in the run.
"""

# What a choice of a draft length has to promise.
TOGGLE_MARGIN = 1.05  # gain before leaving plain rounds: measured costs scatter by about 3 %
CHANGE_MARGIN = 1.02  # gain before any other change; also the largest loss that a choice gone bad can hide
MIN_PLAIN_ROUNDS = 3  # before the first draft: the first round is warm-up
PATIENT_PLAIN_ROUNDS = 16  # the same for a large batch, where an early guess costs more and gains less
FEW_ROWS = 8  # the largest batch that is not a large one
PRIOR_FLAT_ROWS = 2  # up to here a verification is taken to cost a plain round, until plain rounds show the slope

# The budget of exploring, in shares of the seconds of all rollouts. In total at most 2 %.
BUDGET = 0.012  # that trials, preparing drafters and first uses may lose
PLAIN_SHARE = 0.008  # of the time since the last plain round that another one may lose: prices must be recent
PROBE_SHARE = 0.005  # of the time since a known choice was measured that measuring it again may lose
FREE_PLAIN_ROUNDS = 2.0  # the first exploration ever, in plain rounds lost: no budget has accrued yet
TRIAL_PLAIN_ROUNDS = 4.0  # a prepared drafter is tried for at least this loss, in plain rounds
FIRST_ENTRY = 3.0  # the first preparing costs this many times its estimate: the drafter has to be built
PAYBACK = 1.5  # times that the rest of a rollout has to make up for preparing a drafter
ROLLOUTS = 4  # their mean length is expected of the next rollout
MAX_FAILURES = 10  # doublings of the price of preparing a drafter after rollouts in which it did not pay

# Giving up one drafter for another that does the same job better. Between two, changes of the policy cancel.
GIVE_UP_MARGIN = 1.1  # by which the other's rate has to be higher at every size: more than old evidence can be wrong
GIVE_UP_ROLLOUTS = 3  # in a row in which both drafted, and it lost
GIVE_UP_DRAFTS = 300  # examined tokens of each: the standard error of alpha is below 0.03

# Curves of seconds by size.
WINDOW = 9  # measurements per bucket: their median ignores 4 outliers and shows a change within 5 rounds
SETTLED = 4  # measurements of which the lower median outvotes two bad ones
REACH = 2.0  # a draft step's cost is known within this factor of a measured batch
REACH_VERIFY = 1.34  # a verification's within this factor above the longest measured at this batch (γ=2 -> 3, 5 -> 7)

# The machine's pace: seconds now per second of the curves.
PACES = 5  # plain rounds whose median is the pace
PACE_AGE = 10.0  # of these, in plain rounds: older ones are from another moment
SURE_PACES = 3  # so many agree before a pace that differs by ODD is believed: one could be an outlier
ODD = 1.3

# Acceptance.
PRIOR_WEIGHT = 4.0  # examined tokens that a drafter's prior alpha is worth
SHRINK_WEIGHT = 8.0  # examined tokens at which a position weighs as much as the mean over positions
SEED_WEIGHT = 64.0  # examined tokens that the counts of earlier rollouts are worth in a new one
FAST_DECAY, SLOW_DECAY = 0.98, 0.998  # per round: half-lives of 34 and 346; the slow one seeds the next rollout
MAX_AGE = 35  # rounds without drafts age the counts by at most this many: one probe halves older evidence
SURPRISE = 0.2  # of alpha: a drafter not in use that was accepted better by so much is probed again at once
