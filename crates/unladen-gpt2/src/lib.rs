//! GPT-2 on loaded weights, in place: the proof that what was loaded works.
//!
//! [`recognise`] tells from names and shapes which GPT-2 a checkpoint or a state dict is, [`Gpt2`] computes logits and
//! continues a text with the bytes where they lie (owned, mapped or the caller's), [`init`] makes random weights, and
//! [`text`] turns text into token ids and back.

mod config;
mod generate;
pub mod init;
mod math;
mod matmul;
mod model;
mod names;
mod parallel;
mod recognise;
pub mod text;
mod weights;

pub use config::{Config, n_heads_from_config_json};
pub use generate::Generate;
pub use model::Gpt2;
pub use names::Naming;
pub use recognise::{Listed, recognise, tensors_of};
