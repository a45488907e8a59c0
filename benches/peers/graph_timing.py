"""GPU time of calls, from replays of CUDA graphs in turns."""

import statistics

import torch


def capture(stream, call, sets):
    """A graph of one call on each set of inputs, one after the other, so that no call finds its
    inputs in the cache. Everything runs on `stream`, which is current."""
    # What a first call allocates stays outside the graph.
    for inputs in sets:
        call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            call(inputs)
    return graph


def medians_ms(graphs, calls_per_graph, rounds):
    """Milliseconds of one call of each graph, as (median, minimum, maximum) over the rounds. Every
    round replays each graph once, so that clocks and heat affect all alike."""
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
