//! What the page calls. Answers are JSON texts.

use varlen_fa::{Config, Device, DeviceChoice};
use wasm_bindgen::prelude::{JsError, wasm_bindgen};

/// Runs a workload on WebGPU and checks it.
#[wasm_bindgen]
pub async fn run(workload: String, dtype: String) -> Result<String, JsError> {
    let device = Device::with_config_async(Config::default().with_device(DeviceChoice::Wgpu)).await?;
    let report = crate::run(&device, &workload, &dtype).await.map_err(message)?;
    Ok(serde_json::to_string(&report)?)
}

/// Tries what only a browser does differently.
#[wasm_bindgen]
pub async fn selftest() -> Result<String, JsError> {
    Ok(serde_json::to_string(&crate::selftest().await.map_err(message)?)?)
}

/// With the whole chain of causes.
fn message(error: anyhow::Error) -> JsError {
    JsError::new(&format!("{error:#}"))
}
