//! Objects of PyTorch that are no tensors and stand for some: the packed weights of quantised modules, which are objects of
//! C++ in a module, and parameters that never got a shape.

use super::children::Children;
use crate::format::{
    pickle::{Arena, Meaning, Value},
    rebuild::{Named, Parts, Rebuild},
};

/// How classes of C++ are named that hold the weights of quantised modules.
const PACKED: [&[u8]; 3] = [
    b"__torch__.torch.classes.quantized.",
    b"__torch__.torch.classes.sparse.",
    b"__torch__.torch.classes.rnn.",
];
/// Such a class whose module has a scale and a zero point of its own.
const PACKED_LINEAR: &[u8] = b"__torch__.torch.classes.quantized.LinearPackedParamsBase";
/// Such a class whose weight stands among numbers, and alone in the state dict.
const PACKED_EMBEDDING: &[u8] = b"__torch__.torch.classes.quantized.EmbeddingPackedParamsBase";
/// What a module keeps its packed weight in.
const PACKED_NAME: &str = "_packed_params";

/// Modules of quantised convolutions, which are pickled as a tuple of all that they need.
const QUANTISED: [&[u8]; 4] = [
    b"torch.ao.nn.quantized.",
    b"torch.ao.nn.intrinsic.quantized.",
    b"torch.nn.quantized.",
    b"torch.nn.intrinsic.quantized.",
];
const CONVOLUTION: &[u8] = b"Conv";
/// Lengths of that tuple; the first releases wrote no mode of training.
const CONVOLUTION_LENS: [usize; 2] = [14, 15];
/// What stands in it under names of the state dict.
const CONVOLUTION_TENSORS: [(usize, &str); 2] = [(10, "weight"), (11, "bias")];

/// What a state dict has as tensors, and a module as numbers.
pub(super) const NUMBERS: &str = "scales and zero points of what quantised modules give: they are numbers in a pickled \
                                  module, and tensors in its state_dict(), which can be saved instead";

/// Why an object without any data is left out, if it is a parameter that never got a shape.
pub(super) fn uninitialised(arena: &Arena<'_>, call: u32) -> Option<&'static str> {
    let is_one = arena.meaning(arena.calls[call as usize].function) == Meaning::Uninitialised;
    is_one.then_some("it has no shape and no data, as its lazy module had not run when it was saved")
}

/// True for the packed weights of a quantised module. They are a module's attributes, and its state dict lists them.
pub(super) fn is_packed(arena: &Arena<'_>, value: Value) -> bool {
    let Value::Call(call) = value else { return false };
    let class = object(arena, call).map(|(_, class)| class);
    class.is_some_and(|class| PACKED.iter().any(|it| class.starts_with(it)))
}

/// What an object of C++ says of itself, and its class.
fn object<'a>(arena: &'a Arena<'_>, call: u32) -> Option<(Value, &'a [u8])> {
    let call = &arena.calls[call as usize];
    if arena.meaning(call.function) != Meaning::ScriptObject {
        return None;
    }
    match *arena.sequence(call.state)? {
        [state, Value::Str(class)] => Some((state, arena.bytes(class))),
        _ => None,
    }
}

/// What is in an object that a quantised module or its weights are.
pub(super) struct Quantised {
    pub(super) children: Children<'static>,
    /// [`NUMBERS`] are in it, or in the module around it.
    pub(super) has_numbers: bool,
}

/// Takes such an object apart as its state dict does; `None` for all others. `parts` are all values of the object.
pub(super) fn quantised(rebuild: &Rebuild<'_>, call: u32, path: &str, parts: &Parts) -> Option<Quantised> {
    let arena = rebuild.arena;
    if let Some((state, class)) = object(arena, call) {
        let inner = if class == PACKED_EMBEDDING { embedding(rebuild, state) } else { state };
        let own = arena.calls[call as usize].state;
        let parts = parts.iter().map(|&it| if it == own { inner } else { it }).collect();
        let has_numbers = class == PACKED_LINEAR && path.ends_with(PACKED_NAME);
        return Some(Quantised { children: Children::Parts(parts), has_numbers });
    }
    let named = convolution(rebuild, call)?;
    Some(Quantised { children: Children::Named(named), has_numbers: true })
}

/// The weight of an embedding, from (version, [weight], numbers, numbers).
fn embedding(rebuild: &Rebuild<'_>, state: Value) -> Value {
    let arena = rebuild.arena;
    match arena.sequence(state) {
        Some(&[version, tensors, floats, integers])
            if [version, floats, integers].iter().all(|it| rebuild.is_plain(*it)) =>
        {
            match arena.sequence(tensors) {
                Some(&[weight]) => weight,
                _ => state,
            }
        }
        _ => state,
    }
}

/// The tensors of a quantised convolution, by name.
fn convolution(rebuild: &Rebuild<'_>, call: u32) -> Option<Named> {
    let arena = rebuild.arena;
    let call = &arena.calls[call as usize];
    let Value::Symbol(class) = call.function else { return None };
    let class = &arena.symbols[class as usize];
    let Value::Tuple(state) = call.state else { return None };
    let items = arena.run(state);
    let is_one = class.name.starts_with(CONVOLUTION)
        && QUANTISED.iter().any(|it| class.module.starts_with(it))
        && CONVOLUTION_LENS.contains(&items.len())
        && call.args.len == 0
        && call.items == Value::None;
    let is_tensor = |index: usize| CONVOLUTION_TENSORS.iter().any(|it| it.0 == index);
    let others = items.iter().enumerate().filter(|(index, _)| !is_tensor(*index));
    // What is not known to be numbers is listed by its place.
    let is_known = is_one && others.into_iter().all(|(_, it)| rebuild.is_plain(*it));
    is_known.then(|| CONVOLUTION_TENSORS.iter().map(|&(index, name)| (name, items[index])).collect())
}
