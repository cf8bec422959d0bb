"""What `python benchmarks/gpu_check.py` is made of: the driver, the sections and the report.

driver    each section in a process of its own, with a time limit that ends all of its processes
record    the JSON file, whole on disk at every moment
child     one section inside its process: row by row
tools     machine, build, tests        sanitizer   compute-sanitizer
once      what that runs through torch
kernels   copy, perturb, graph, crossover          layers      block, layers, averaging
producers producers, models
switches  variants of the kernels, each against today's form
report    the text and the plot
"""
