//! The free metadata of a safetensors file: strings that mean nothing to the format.

use crate::{
    error::{Fault, Result},
    format::OpenOptions,
    source::ReadAt,
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// What stands under `__metadata__` in a file that was opened before, sorted by key.
pub(in crate::format) fn metadata(
    source: &dyn ReadAt,
    options: &OpenOptions,
) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        metadata: Option<BTreeMap<String, String>>,
    }
    let header = super::header(source, options)?;
    let header: Header = serde_json::from_slice(&header)
        .map_err(|error| Fault::new("a safetensors header in JSON", error.to_string()).corrupt())?;
    Ok(header.metadata.unwrap_or_default())
}
