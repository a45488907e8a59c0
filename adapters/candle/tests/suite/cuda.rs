//! What a GPU alone can show: whose stream it is, and that nothing is copied.

use std::ptr;

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUgraph, CUgraphInstantiate_flags, CUgraphNodeType, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Error, Result, Tensor};
use varlen_fa_candle::Attention;
use varlen_fa_candle::varlen_fa::{KeyMask, VarlenMeta};

use crate::reference::{devices, random, values};

/// A GPU, on a stream of its own.
fn gpu() -> Result<Option<Device>> {
    Ok(devices()?.into_iter().map(|(device, _)| device).find(Device::is_cuda))
}

fn masked(seq: usize, lengths: &[usize]) -> Result<Attention> {
    let mask = KeyMask::from_lengths(seq, lengths).map_err(Error::wrap)?;
    Ok(Attention::masked(&VarlenMeta::from_key_mask(&mask).map_err(Error::wrap)?))
}

/// What a graph does, in the order in which it was captured.
fn nodes(graph: CUgraph) -> Result<Vec<CUgraphNodeType>> {
    let mut count = 0;
    // SAFETY: the graph is live; null asks for the number of nodes.
    unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) }.result().map_err(Error::wrap)?;
    let mut nodes = vec![ptr::null_mut(); count];
    // SAFETY: as above; there is room for as many as it says.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result().map_err(Error::wrap)?;
    let kind = |&node: &_| {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is of a live graph.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().map_err(Error::wrap)?;
        Ok(kind)
    };
    nodes.iter().map(kind).collect()
}

/// Captured on candle's stream, so that is where it goes; and then it is the output's allocation and one kernel.
#[test]
fn a_call_is_one_kernel_on_candles_stream_and_copies_nothing() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let cuda = device.as_cuda_device()?;
    // SAFETY: all tensors of this test are used on this one stream. Their events would lead out of the capture.
    unsafe { cuda.disable_event_tracking() };
    let (heads, seq) = (4, 96);
    let fused = random(&[2, seq, 3 * heads, 64], DType::BF16, &device)?;
    let [q, k, v] = [0, 1, 2].map(|part| fused.narrow(2, part * heads, heads));
    let (q, k, v) = (q?, k?, v?);
    let attention = masked(seq, &[96, 40])?;
    // Loads the kernels, and uploads the metadata.
    let expected = values(&attention.forward(&q, &k, &v)?)?;

    let stream = cuda.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(Error::wrap)?;
    let captured = attention.forward(&q, &k, &v);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(Error::wrap)?;
    let (captured, graph) = (captured?, graph.expect("something was captured"));
    let expected_nodes = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC, CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL];
    assert_eq!(nodes(graph.cu_graph())?, expected_nodes);
    graph.launch().map_err(Error::wrap)?;
    assert_eq!(values(&captured)?, expected);
    Ok(())
}

/// A producer, attention and a consumer in a row, many times, without a wait between them: each would read what is not there yet, if the
/// three had no order.
#[test]
fn work_before_and_after_is_ordered_on_every_stream() -> Result<()> {
    for (device, _) in devices()?.into_iter().filter(|(device, _)| device.is_cuda()) {
        let attention = masked(128, &[128, 7, 0, 64])?;
        let start = random(&[4, 128, 4, 64], DType::F16, &device)?;
        let step = |x: &Tensor| -> Result<Tensor> {
            let x = ((x * 0.5)? + 0.25)?;
            attention.forward(&x, &x, &x)? * 1.5
        };
        let mut at_once = start.clone();
        let mut one_by_one = start;
        for _ in 0..50 {
            at_once = step(&at_once)?;
        }
        for _ in 0..50 {
            one_by_one = step(&one_by_one)?;
            device.synchronize()?;
        }
        assert_eq!(values(&at_once)?, values(&one_by_one)?);
    }
    Ok(())
}

#[test]
fn single_precision_is_refused_with_what_there_is() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let q = random(&[1, 8, 2, 32], DType::F32, &device)?;
    let error = masked(8, &[8])?.forward(&q, &q, &q).unwrap_err().to_string();
    assert!(error.contains("f32") && error.contains("f16"), "{error}");
    Ok(())
}
