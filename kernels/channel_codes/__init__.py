"""Rows of many channels in codes of 1 to 8 bits, another number of bits for each channel.

A channel's numbers are low + code * step, with low and step of its own in fp32; a code of n bits has 2^n levels. Codes
are packed as bit planes: plane after plane of a channel, channel after channel, eight rows to a byte. So a message has
exactly (sum of the channels' bits) / 8 bytes a row, whatever the bits are, and 8 bytes a channel beside. Channels of
learned bits are those of AMAQ (2025, https://arxiv.org/abs/2510.05468); `trainer.parallel.learned_bits` learns them.

`codes` has them, in torch alone.
"""

from __future__ import annotations

MOST_BITS = 8
SCALE_BYTES = 8
"""low and step of a channel."""
