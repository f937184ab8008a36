//! Names, and where their tensors lie. Memory goes with the last tensor in it.

use super::{
    Arena,
    view::{Bytes, TensorView},
};
use crate::{
    device::Device,
    error::{Fault, Result},
    memory::{Held, Space},
    tensor::Layout,
};
use indexmap::IndexMap;

/// Where a tensor lies in a state dict.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Position of the arena.
    pub arena: usize,
    /// Where its storage starts in the arena; the layout's offset counts from here.
    pub start_byte: u64,
    /// Row-major, unless it is a view of a mapping.
    pub layout: Layout,
}

/// A tensor that was taken out of a state dict.
#[derive(Debug)]
pub struct Removed<'a> {
    /// Where its storage starts in the arena; the layout's offset counts from here.
    pub start_byte: u64,
    /// Row-major, unless it is a view of a mapping.
    pub layout: Layout,
    /// The memory, if no other tensor of the state dict lies in it: given back when this is dropped. `None`: some do, and
    /// the last of them takes it along.
    pub arena: Option<Arena<'a>>,
}

/// Loaded weights: names, and tensors in a few arenas. Tied tensors share their bytes.
#[derive(Debug, Default)]
pub struct StateDict<'a> {
    homes: Vec<Home<'a>>,
    tensors: IndexMap<String, Placed>,
}

/// An arena, for as long as tensors lie in it.
#[derive(Debug)]
struct Home<'a> {
    arena: Option<Arena<'a>>,
    n_tensors: usize,
}

impl<'a> StateDict<'a> {
    /// Puts tensors into arenas. One without any is given back.
    ///
    /// Fails if a tensor does not lie inside its arena, or a name stands twice.
    pub fn new(
        arenas: Vec<Arena<'a>>,
        tensors: impl IntoIterator<Item = (String, Placed)>,
    ) -> Result<StateDict<'a>> {
        let homes = arenas.into_iter().map(|it| Home { arena: Some(it), n_tensors: 0 }).collect();
        let mut state = StateDict { homes, tensors: IndexMap::new() };
        for (name, placed) in tensors {
            let n_homes = state.homes.len();
            let Some(home) = state.homes.get_mut(placed.arena) else {
                let expected = format!("one of {n_homes} arenas");
                return Err(Fault::new(expected, format!("number {}", placed.arena)).tensor(name).mismatch());
            };
            home.n_tensors += 1;
            let len_bytes = home.arena.as_ref().map_or(0, Arena::len_bytes);
            let end_byte = placed.start_byte.saturating_add(placed.layout.stored_bytes().end);
            if end_byte > len_bytes {
                let expected = format!("an arena of at least {end_byte} bytes");
                return Err(Fault::new(expected, format!("{len_bytes} bytes")).tensor(name).mismatch());
            }
            if state.tensors.contains_key(&name) {
                return Err(Fault::new("each name once", "a second one").tensor(name).mismatch());
            }
            state.tensors.insert(name, placed);
        }
        state.homes.iter_mut().filter(|it| it.n_tensors == 0).for_each(|it| it.arena = None);
        Ok(state)
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|placed| self.view(placed))
    }

    /// Every tensor, in the checkpoint's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, TensorView<'_>)> {
        self.tensors.iter().map(|(name, placed)| (name.as_str(), self.view(placed)))
    }

    /// Number of tensors, tied ones counted by name.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// True if any tensor is a view of a mapped file, whose bytes are read when they are touched.
    pub fn is_mapped(&self) -> bool {
        self.homes.iter().any(|it| matches!(it.arena, Some(Arena::Mapped(_))))
    }

    /// Takes a tensor out. The others keep their order, so it takes longer the more tensors are behind it.
    ///
    /// Its memory is given back as soon as what this returns is dropped, unless other tensors lie in it: a tied one, or
    /// all that share a range of the host or of a GPU. On a GPU each tensor has memory of its own where the plan asked for
    /// that.
    ///
    /// ```no_run
    /// use unladen::{Device, PlanOptions, RunOptions, Strategy};
    ///
    /// let checkpoint = unladen::open("gpt2.safetensors")?;
    /// let options = PlanOptions {
    ///     device: Device::Cuda(0),
    ///     frees_singly: true,
    ///     ..PlanOptions::new(Strategy::Stream)
    /// };
    /// let mut state = checkpoint.run(&checkpoint.plan(&options)?, RunOptions::default())?.state;
    /// let before_bytes = state.held().device_bytes.get(Device::Cuda(0));
    /// if let Some(tensor) = state.remove("h.11.mlp.c_fc.weight") {
    ///     let len_bytes = tensor.layout.len_bytes();
    ///     drop(tensor); // the GPU has it back
    ///     assert!(state.held().device_bytes.get(Device::Cuda(0)) <= before_bytes - len_bytes);
    /// }
    /// # Ok::<(), unladen::Error>(())
    /// ```
    pub fn remove(&mut self, name: &str) -> Option<Removed<'a>> {
        let Placed { arena, start_byte, layout } = self.tensors.shift_remove(name)?;
        let home = self.homes.get_mut(arena)?;
        home.n_tensors -= 1;
        let arena = if home.n_tensors == 0 { home.arena.take() } else { None };
        Some(Removed { start_byte, layout, arena })
    }

    /// What it holds: memory of its own by device, gaps between tensors included, and mapped files. Memory that belongs to
    /// the caller is not counted.
    pub fn held(&self) -> Held {
        let mut held = Held::default();
        for arena in self.homes.iter().filter_map(|it| it.arena.as_ref()) {
            let space = match arena {
                Arena::Owned(_) => Space::Device(Device::Host),
                Arena::Cuda(memory) => Space::Device(Device::Cuda(memory.ordinal())),
                Arena::Mapped(_) => Space::Mapped,
                Arena::Caller(_) => continue,
            };
            held.add(space, arena.len_bytes());
        }
        held
    }

    fn view<'s>(&'s self, placed: &'s Placed) -> TensorView<'s> {
        let stored = placed.layout.stored_bytes();
        let start_byte = placed.start_byte + stored.start;
        let len_bytes = stored.end - stored.start;
        let bytes = match &self.homes[placed.arena].arena {
            Some(Arena::Cuda(memory)) => Bytes::OnGpu { memory, start_byte, len_bytes },
            arena => {
                let range = start_byte as usize..(start_byte + len_bytes) as usize;
                Bytes::OnHost(&arena.as_ref().and_then(Arena::as_slice).unwrap_or_default()[range])
            }
        };
        TensorView {
            dtype: placed.layout.dtype(),
            shape: placed.layout.shape(),
            stride: placed.layout.stride(),
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        memory::{HostBuffer, Ledger},
    };
    use std::{path::Path, sync::Arc};

    fn owned(ledger: &Arc<Ledger>, len_bytes: u64) -> Arena<'static> {
        let reservation = ledger.reserve(Space::Device(Device::Host), len_bytes);
        Arena::Owned(HostBuffer::new(reservation, Path::new("test")).unwrap())
    }

    fn on_host(len_bytes: u64) -> Held {
        let mut held = Held::default();
        held.add(Space::Device(Device::Host), len_bytes);
        held
    }

    /// One arena with a tied pair, one with two neighbours, and one that nobody is in.
    fn state(ledger: &Arc<Ledger>) -> StateDict<'static> {
        let arenas = vec![owned(ledger, 4096), owned(ledger, 8192), owned(ledger, 16384)];
        let tensors = [("head", 0, 64), ("embedding", 0, 64), ("norm.0", 1, 0), ("norm.1", 1, 100)];
        let placed = tensors.map(|(name, arena, start_byte)| {
            let layout = Layout::contiguous(DType::U8, &[100]).unwrap();
            (name.to_owned(), Placed { arena, start_byte, layout })
        });
        StateDict::new(arenas, placed).unwrap()
    }

    #[test]
    fn memory_goes_with_the_last_tensor_in_it_and_the_ledger_says_so() {
        let ledger = Ledger::new();
        let mut state = state(&ledger);
        let held = |state: &StateDict<'_>| {
            assert_eq!(state.held(), ledger.get().0);
            state.held().device_bytes.host_bytes
        };
        assert_eq!(held(&state), 4096 + 8192, "nobody is in the third");
        for (name, left_bytes) in
            [("head", 4096 + 8192), ("norm.1", 4096 + 8192), ("embedding", 8192), ("norm.0", 0)]
        {
            let removed = state.remove(name).unwrap();
            assert_eq!(removed.layout.len_bytes(), 100);
            drop(removed);
            assert_eq!(held(&state), left_bytes, "after {name}");
            assert!(state.get(name).is_none() && state.remove(name).is_none());
        }
        assert!(state.is_empty());
    }

    #[test]
    fn what_is_removed_keeps_its_bytes_as_long_as_it_is_kept() {
        let ledger = Ledger::new();
        let mut state = state(&ledger);
        assert!(state.remove("embedding").unwrap().arena.is_none(), "`head` is in it still");
        let removed = state.remove("head").unwrap();
        drop(state);
        let mut arena = removed.arena.unwrap();
        assert_eq!((removed.start_byte, arena.len_bytes(), ledger.get().0), (64, 4096, on_host(4096)));
        arena.as_mut_slice().unwrap()[64..164].fill(7);
        drop(arena);
        assert_eq!(ledger.get().0, Held::default());
    }

    #[test]
    fn the_others_keep_their_order_and_their_bytes() {
        let mut bytes: Vec<u8> = (0..40).collect();
        let placed = (0..4u64).map(|number| {
            let layout = Layout::contiguous(DType::U8, &[10]).unwrap();
            (number.to_string(), Placed { arena: 0, start_byte: 10 * number, layout })
        });
        let mut state = StateDict::new(vec![Arena::Caller(&mut bytes)], placed).unwrap();
        assert_eq!(state.held(), Held::default(), "the caller's memory is his own");
        state.remove("1");
        let left: Vec<_> = state.iter().map(|(name, view)| (name, view.host_bytes().unwrap()[0])).collect();
        assert_eq!(left, [("0", 0), ("2", 20), ("3", 30)]);
        assert_eq!(state.len(), 3);
    }
}
