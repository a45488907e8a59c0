//! Copies and numbers, one after the other, that are described once and then launched on a stream again and again: a launch takes the
//! driver less than any one of the calls that it stands for.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::DriverError;
use cudarc::driver::result::graph;
use cudarc::driver::sys::{
    self, CUDA_BATCH_MEM_OP_NODE_PARAMS, CUDA_MEMCPY3D, CUdeviceptr, CUgraph, CUgraphExec, CUgraphInstantiate_flags,
    CUgraphNode, CUresult, CUstream, CUstreamBatchMemOpParams,
    CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st as WriteValue,
    CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st__bindgen_ty_1 as Value, CUstreamBatchMemOpType,
    CUstreamWriteValue_flags,
};

use crate::error::Result;

use super::capture::RelaxedCapture;
use super::context::Context;

/// What can be launched again. Memory that it names must be there whenever it runs.
pub struct Graph {
    raw: CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from any thread, and its context lives as long.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graph {:p}", self.raw)
    }
}

/// A graph that is being described. The context is current.
pub struct Steps<'a> {
    raw: CUgraph,
    context: &'a Arc<Context>,
    last: Option<CUgraphNode>,
    /// Another thread may be capturing a stream.
    _relaxed: RelaxedCapture,
}

impl<'a> Steps<'a> {
    pub fn new(context: &'a Arc<Context>) -> Result<Self, DriverError> {
        let relaxed = RelaxedCapture::enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the pointer is to a handle; there are no flags.
        unsafe { sys::cuGraphCreate(&mut raw, 0) }.result()?;
        Ok(Self { raw, context, last: None, _relaxed: relaxed })
    }

    /// Copies next.
    ///
    /// # Safety
    /// Whenever the graph runs, both places are memory that the context's device has access to.
    pub unsafe fn copy(&mut self, copy: &CUDA_MEMCPY3D) -> Result<(), DriverError> {
        let (graph, context) = (self.raw, self.context.raw());
        self.add(|node, before, count| {
            // SAFETY: the graph is live and so are the nodes before; the struct is read before the call returns. The rest by
            // the caller's promise.
            unsafe { sys::cuGraphAddMemcpyNode(node, graph, before, count, copy, context) }
        })
    }

    /// Sets a number next.
    ///
    /// # Safety
    /// Whenever the graph runs, the address is that of a `u32` in memory of the context that is of no pool.
    pub unsafe fn set(&mut self, address: CUdeviceptr, number: u32) -> Result<(), DriverError> {
        let mut operation = CUstreamBatchMemOpParams { pad: [0; 6] };
        operation.writeValue = WriteValue {
            operation: CUstreamBatchMemOpType::CU_STREAM_MEM_OP_WRITE_VALUE_32,
            address,
            __bindgen_anon_1: Value { value64: u64::from(number) },
            flags: CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32,
            alias: 0,
        };
        let params =
            CUDA_BATCH_MEM_OP_NODE_PARAMS { ctx: self.context.raw(), count: 1, paramArray: &mut operation, flags: 0 };
        let graph = self.raw;
        self.add(|node, before, count| {
            // SAFETY: as in `copy`; the operation is copied before the call returns.
            unsafe { sys::cuGraphAddBatchMemOpNode(node, graph, before, count, &params) }
        })
    }

    /// `add` makes a node after so many others, of which there is an array.
    fn add(
        &mut self,
        add: impl FnOnce(*mut CUgraphNode, *const CUgraphNode, usize) -> CUresult,
    ) -> Result<(), DriverError> {
        let mut node = ptr::null_mut();
        let before = self.last.as_ref();
        add(&mut node, before.map_or(ptr::null(), ptr::from_ref), before.iter().len()).result()?;
        self.last = Some(node);
        Ok(())
    }

    pub fn finish(self) -> Result<Graph, DriverError> {
        // SAFETY: the graph is live.
        let raw = unsafe { graph::instantiate(self.raw, CUgraphInstantiate_flags(0)) }?;
        Ok(Graph { raw, context: Arc::clone(self.context) })
    }
}

impl Drop for Steps<'_> {
    fn drop(&mut self) {
        // SAFETY: the graph is live, and this is its only owner; what was made of it does not need it.
        let destroyed = unsafe { graph::destroy(self.raw) };
        if let Err(error) = destroyed {
            log::debug!("the description of a graph is not freed: {error}");
        }
    }
}

impl Graph {
    /// Runs it in the order of a stream of the context, which is current.
    ///
    /// # Safety
    /// The stream is live, and the memory that the graph names is there until it has run.
    pub unsafe fn launch(&self, stream: CUstream) -> Result<()> {
        // SAFETY: the graph is live; the rest by the caller's promise.
        let launched = unsafe { graph::launch(self.raw, stream) };
        self.context.check(launched, "launching a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: this is its only owner; the driver lets it finish its work.
        let destroyed = unsafe { graph::exec_destroy(self.raw) };
        if let Err(error) = destroyed {
            log::debug!("a graph is not freed: {error}");
        }
    }
}
