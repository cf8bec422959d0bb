"""At home in other people's trainers; each module needs its framework, and none is imported by
`import dipkernels`."""
