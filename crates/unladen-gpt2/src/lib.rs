//! GPT-2 on loaded weights, in place: the proof that what was loaded works.
//!
//! [`recognise`] tells from names and shapes which GPT-2 a checkpoint or a state dict is, [`Gpt2`] computes logits and
//! continues a text with the bytes where they lie (owned, mapped or the caller's), [`init`] makes random weights, and
//! [`text`] turns text into token ids and back.
//!
//! ```
//! use unladen::{StateDict, destination::{Arena, Placed}, memory::{HostBuffer, Reservation}, tensor::Layout};
//! use unladen_gpt2::{Config, Gpt2, init};
//!
//! // A random model of the smallest size, its tensors one after the other.
//! let config = Config { vocab_size: 100, context_length: 16, ..Config::named("tiny").unwrap() };
//! let tensors = init::tensors(&config)?;
//! let len_bytes = tensors.iter().map(|it| it.len_bytes()).sum();
//! let mut buffer = HostBuffer::new(Reservation::uncounted(len_bytes), "random".as_ref())?;
//! let (mut start_byte, mut placed) = (0, Vec::new());
//! for tensor in &tensors {
//!     let end_byte = start_byte + tensor.len_bytes();
//!     tensor.fill_bytes(123, 0, &mut buffer.as_mut_slice()[start_byte as usize..end_byte as usize]);
//!     let layout = Layout::contiguous(init::Planned::DTYPE, &tensor.shape)?;
//!     placed.push((tensor.name.clone(), Placed { arena: 0, start_byte, layout }));
//!     start_byte = end_byte;
//! }
//! let state = StateDict::new(vec![Arena::Owned(buffer)], placed)?;
//!
//! let gpt2 = Gpt2::of(&state, None)?.expect("a GPT-2");
//! assert_eq!(gpt2.forward(&[1, 2, 3])?.len(), 3 * 100);
//! assert_eq!(gpt2.generate(&[1, 2, 3], 5, None)?.count(), 5);
//! # Ok::<(), unladen::Error>(())
//! ```

mod config;
mod few;
mod generate;
pub mod gpu;
pub mod init;
mod math;
mod matmul;
mod model;
mod names;
mod parallel;
mod recognise;
pub mod text;
mod weights;

pub use config::{Config, n_heads_from_config_json, ties_head_in_config_json};
pub use generate::Generate;
pub use model::Gpt2;
pub use names::Naming;
pub use recognise::{Listed, recognise, tensors_of};
