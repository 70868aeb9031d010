"""Every implementation that is compared, by the op it stands beside, ours first."""

from bench.peers import hidden, logits, ours, pytorch

PEERS = {
    "token_logprob": ours.LOGITS + pytorch.LOGITS + logits.LOGITS,
    "linear_logprob": ours.HIDDEN + pytorch.HIDDEN + hidden.HIDDEN,
}
