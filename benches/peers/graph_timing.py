"""GPU time of calls, from replays of CUDA graphs that are taken in turns."""

import statistics

import torch


def capture(stream, call, sets):
    """A graph of one call on each set of inputs, one after the other: a cache that holds one set's data does not hold the next's.
    Everything runs on `stream`, which is current."""
    # What is made once, at the first call, is made outside of the graph.
    for inputs in sets:
        call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            call(inputs)
    return graph


def medians_ms(graphs, calls_per_graph, rounds):
    """Milliseconds of one call of each graph, as (median, least, greatest) over the rounds; every round replays each graph
    once, so that clocks and heat are shared."""
    times = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            # The first rounds warm up.
            if turn >= 2:
                times[name].append(start.elapsed_time(end) / calls_per_graph)
    return {name: (statistics.median(found), min(found), max(found)) for name, found in times.items()}
