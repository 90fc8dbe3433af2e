"""What the rooms share: number codecs, online softmax, and which chip a launch is for."""
