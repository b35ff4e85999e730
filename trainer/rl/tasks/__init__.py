"""Problems with verifiable answers that a machine can make without end, and prompts of one's own."""
