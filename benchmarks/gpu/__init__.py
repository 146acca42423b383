"""Everything that one visit to a machine with a GPU has to answer: `python -m benchmarks.gpu --output DIR`.

__main__    runs the parts one after another, each in a process with its own time limit
parts       which parts there are, and what became of each
page        the page of Markdown
report      what a part writes down while it runs, so that its time limit loses nothing
device      the device: its name, its clock, its copy bandwidth
outcomes    a plugin of pytest that writes down every test as it ends
waits       part: where the host waits for the device in a training step
input_norm  part: input normalisation, against the copy bandwidth
training    part: training steps of a ResNet-50
"""
