"""PaCA: some columns of the pretrained matrices, trained in place."""
