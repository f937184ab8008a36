//! Names of Python code in a pickle, and what the few known ones mean to a reader of tensors. A name is never resolved.

use crate::dtype::DType;
use std::fmt;

/// A class or function that a pickle names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Symbol<'a> {
    pub(crate) module: &'a [u8],
    pub(crate) name: &'a [u8],
    pub(crate) meaning: Meaning,
}

impl fmt::Display for Symbol<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", String::from_utf8_lossy(self.module), String::from_utf8_lossy(self.name))
    }
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Nothing that we know of: its calls are kept as they are, and the user is told.
    Unknown,
    /// Known to hold no tensors of its own; its calls are kept as they are.
    Harmless,
    /// A dictionary.
    Dict,
    /// A list, tuple or set around its only argument.
    Sequence,
    /// A class of storages; `None`: untyped bytes.
    Storage(Option<DType>),
    /// `torch.float32` and the like.
    DType(DType),
    /// `torch.FloatTensor` of the first releases: its state is (storage, offset, size, stride).
    OldTensor(DType),
    /// `Parameter` as a class: its state or arguments start with a tensor.
    ParameterClass,
    /// (storage, offset, size, stride).
    Tensor,
    /// The same, then requires_grad, hooks and perhaps metadata.
    TensorV2,
    /// The same with a dtype behind the hooks.
    TensorV3,
    /// (tensor, requires_grad, hooks).
    Parameter,
    /// The same, then a state.
    ParameterWithState,
    /// (function, type, args, state).
    FromType,
    /// (storage, offset, size, stride, quantiser, requires_grad, hooks).
    Quantised,
    /// `torch.per_tensor_affine` and the like.
    Scheme(&'static str),
    /// (layout, parts and sizes).
    Sparse,
    /// (name) gives a layout.
    GetLayout,
    /// (buffer, sizes, strides, offsets).
    Nested,
    /// (parts by name).
    Jagged,
    /// (class, dtype, size, stride, offset, layout, device, requires_grad): the data are in its attributes.
    Wrapper,
    /// (dtype, size, stride, requires_grad).
    Meta,
    /// (tensor, dtype, device, requires_grad).
    FromCpuTensor,
    /// (bytes): a whole legacy file inside the pickle, which holds a storage.
    LoadFromBytes,
    /// (array of NumPy, dtype, device, requires_grad).
    FromNumpy,
    /// An array of NumPy: its state is (version, shape, dtype, is column-major, bytes).
    NumpyArray,
    /// The same from protocol 5 on: (bytes, dtype, shape, order).
    NumpyBuffer,
    /// (name, ..), and a state of (version, byte order, ..).
    NumpyDType,
    /// (text, encoding): how protocols below 3 write bytes.
    Encode,
    /// (bytes): how protocols below 5 write bytes that can be changed.
    ByteArray,
    /// An object of C++: its state is (what it says of itself, the name of its class).
    ScriptObject,
    /// (requires_grad): a parameter or buffer of a lazy module that has not run.
    Uninitialised,
    /// (value, type) in TorchScript: the value.
    TypeTag,
}

impl Meaning {
    /// True for calls that stand for a tensor: they have no items, and no state but where the meaning says so.
    pub(crate) fn is_tensor(self) -> bool {
        self.takes_no_state() || matches!(self, Meaning::OldTensor(_) | Meaning::ParameterClass)
    }

    /// True for calls that stand for a tensor, plain or not, and for one of unknown class around it.
    pub(crate) fn makes_tensor(self) -> bool {
        self.is_tensor() || matches!(self, Meaning::FromType | Meaning::Jagged | Meaning::Wrapper)
    }

    /// True for functions whose arguments say everything.
    pub(crate) fn takes_no_state(self) -> bool {
        matches!(
            self,
            Meaning::Tensor
                | Meaning::TensorV2
                | Meaning::TensorV3
                | Meaning::Parameter
                | Meaning::ParameterWithState
                | Meaning::Quantised
                | Meaning::Sparse
                | Meaning::Nested
                | Meaning::Meta
                | Meaning::FromCpuTensor
                | Meaning::FromNumpy
                | Meaning::LoadFromBytes
        )
    }
}

const KNOWN: &[(&str, &str, Meaning)] = &[
    ("collections", "OrderedDict", Meaning::Dict),
    ("collections", "defaultdict", Meaning::Dict),
    ("collections", "Counter", Meaning::Dict),
    ("builtins", "dict", Meaning::Dict),
    ("builtins", "list", Meaning::Sequence),
    ("builtins", "tuple", Meaning::Sequence),
    ("builtins", "set", Meaning::Sequence),
    ("builtins", "frozenset", Meaning::Sequence),
    ("torch", "Size", Meaning::Sequence),
    ("torch._utils", "_rebuild_tensor", Meaning::Tensor),
    ("torch._utils", "_rebuild_tensor_v2", Meaning::TensorV2),
    ("torch._utils", "_rebuild_tensor_v3", Meaning::TensorV3),
    ("torch._utils", "_rebuild_parameter", Meaning::Parameter),
    ("torch._utils", "_rebuild_parameter_with_state", Meaning::ParameterWithState),
    ("torch._tensor", "_rebuild_from_type", Meaning::FromType),
    ("torch._tensor", "_rebuild_from_type_v2", Meaning::FromType),
    ("torch._utils", "_rebuild_qtensor", Meaning::Quantised),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", Meaning::Meta),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", Meaning::FromCpuTensor),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", Meaning::FromNumpy),
    ("torch._utils", "_rebuild_xla_tensor", Meaning::FromNumpy),
    ("torch.storage", "_load_from_bytes", Meaning::LoadFromBytes),
    ("torch.nn.parameter", "Parameter", Meaning::ParameterClass),
    ("torch.nn.parameter", "UninitializedParameter", Meaning::Uninitialised),
    ("torch.nn.parameter", "UninitializedBuffer", Meaning::Uninitialised),
    ("torch.storage", "UntypedStorage", Meaning::Storage(None)),
    ("torch.storage", "_UntypedStorage", Meaning::Storage(None)),
    ("torch", "UntypedStorage", Meaning::Storage(None)),
    ("torch._utils", "_rebuild_sparse_tensor", Meaning::Sparse),
    ("torch._utils", "_rebuild_nested_tensor", Meaning::Nested),
    ("torch._utils", "_rebuild_wrapper_subclass", Meaning::Wrapper),
    ("torch.nested._internal.nested_tensor", "_rebuild_njt", Meaning::Jagged),
    ("torch.nested._internal.nested_tensor", "NestedTensor", Meaning::Harmless),
    ("torch.serialization", "_get_layout", Meaning::GetLayout),
    ("torch", "ScriptObject", Meaning::ScriptObject),
    ("torch._C", "ScriptObject", Meaning::ScriptObject),
    ("torch", "Tensor", Meaning::Harmless),
    ("torch", "device", Meaning::Harmless),
    ("torch", "per_tensor_affine", Meaning::Scheme("per_tensor_affine")),
    ("torch", "per_channel_affine", Meaning::Scheme("per_channel_affine")),
    ("torch", "per_tensor_symmetric", Meaning::Scheme("per_tensor_symmetric")),
    ("torch", "per_channel_symmetric", Meaning::Scheme("per_channel_symmetric")),
    ("torch", "per_channel_affine_float_qparams", Meaning::Scheme("per_channel_affine_float_qparams")),
    ("builtins", "complex", Meaning::Harmless),
    ("builtins", "bytearray", Meaning::ByteArray),
    ("builtins", "bytes", Meaning::ByteArray),
    ("builtins", "int", Meaning::Harmless),
    ("builtins", "float", Meaning::Harmless),
    ("builtins", "str", Meaning::Harmless),
    ("_codecs", "encode", Meaning::Encode),
    ("argparse", "Namespace", Meaning::Harmless),
    ("numpy", "dtype", Meaning::NumpyDType),
    ("numpy", "ndarray", Meaning::Harmless),
    ("numpy.core.multiarray", "scalar", Meaning::Harmless),
    ("numpy.core.multiarray", "_reconstruct", Meaning::NumpyArray),
    ("numpy._core.multiarray", "scalar", Meaning::Harmless),
    ("numpy._core.multiarray", "_reconstruct", Meaning::NumpyArray),
    ("numpy.core.numeric", "_frombuffer", Meaning::NumpyBuffer),
    ("numpy._core.numeric", "_frombuffer", Meaning::NumpyBuffer),
    ("torch.jit._pickle", "build_intlist", Meaning::Sequence),
    ("torch.jit._pickle", "build_doublelist", Meaning::Sequence),
    ("torch.jit._pickle", "build_boollist", Meaning::Sequence),
    ("torch.jit._pickle", "build_tensorlist", Meaning::Sequence),
    ("torch.jit._pickle", "restore_type_tag", Meaning::TypeTag),
    ("pathlib", "PosixPath", Meaning::Harmless),
    ("pathlib", "WindowsPath", Meaning::Harmless),
    ("datetime", "datetime", Meaning::Harmless),
    ("datetime", "timedelta", Meaning::Harmless),
    ("datetime", "date", Meaning::Harmless),
    ("datetime", "timezone", Meaning::Harmless),
];

/// Modules that have had other names: the old one, today's.
const RENAMED: &[(&str, &str)] =
    &[("__builtin__", "builtins"), ("torch.tensor", "torch._tensor"), ("copy_reg", "copyreg")];

/// A module by its name of today.
pub(crate) fn modern_module(module: &str) -> &str {
    RENAMED.iter().find(|(old, _)| *old == module).map_or(module, |(_, today)| today)
}

/// Modules whose classes of storages and tensors are named after element types.
const TYPED: &[&str] = &["torch", "torch.cuda", "torch.storage"];

/// Modules of sparse tensors by class, which stand as a type beside functions that say all.
const SPARSE: &[&str] = &["torch.sparse", "torch.cuda.sparse"];

/// `int1` to `int7` and `uint1` to `uint7`: types of PyTorch that no tensor of a file has.
fn is_short_integer(name: &str) -> bool {
    let bits = name.strip_prefix("uint").or_else(|| name.strip_prefix("int")).unwrap_or_default();
    matches!(bits.as_bytes(), [b'1'..=b'7'])
}

/// What `module.name` stands for.
pub(super) fn meaning(module: &[u8], name: &[u8]) -> Meaning {
    let (Ok(module), Ok(name)) = (std::str::from_utf8(module), std::str::from_utf8(name)) else {
        return Meaning::Unknown;
    };
    let module = modern_module(module);
    if let Some((.., meaning)) = KNOWN.iter().find(|(a, b, _)| (*a, *b) == (module, name)) {
        return *meaning;
    }
    // Classes of the program that an archive of TorchScript holds; there is no such module.
    if module == "__torch__" || module.starts_with("__torch__.") {
        return Meaning::Harmless;
    }
    if SPARSE.contains(&module) && name.ends_with("Tensor") {
        return Meaning::Harmless;
    }
    if !TYPED.contains(&module) {
        return Meaning::Unknown;
    }
    if let Some(dtype) = DType::from_storage_class(name) {
        return Meaning::Storage(Some(dtype));
    }
    if let Some(dtype) = DType::from_name(name).filter(|it| it.is_in_pytorch()) {
        return Meaning::DType(dtype);
    }
    let element = name.strip_suffix("Tensor").unwrap_or_default();
    let old = DType::from_storage_class(&format!("{element}Storage")).map(Meaning::OldTensor);
    old.unwrap_or(if is_short_integer(name) { Meaning::Harmless } else { Meaning::Unknown })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_mean_what_every_release_meant_by_them() {
        assert_eq!(meaning(b"torch", b"FloatStorage"), Meaning::Storage(Some(DType::F32)));
        assert_eq!(meaning(b"torch.cuda", b"HalfStorage"), Meaning::Storage(Some(DType::F16)));
        assert_eq!(meaning(b"torch", b"float8_e4m3fn"), Meaning::DType(DType::F8E4M3));
        assert_eq!(meaning(b"torch", b"float6_e2m3_packed"), Meaning::Unknown);
        assert_eq!(meaning(b"torch", b"LongTensor"), Meaning::OldTensor(DType::I64));
        assert_eq!(meaning(b"torch.tensor", b"_rebuild_from_type_v2"), Meaning::FromType);
        assert_eq!(meaning(b"__builtin__", b"set"), Meaning::Sequence);
        assert_eq!(meaning(b"os", b"system"), Meaning::Unknown);
        assert_eq!(meaning(b"evil", b"FloatStorage"), Meaning::Unknown);
        assert_eq!(meaning(b"torch", b"Tensor"), Meaning::Harmless);
        assert_eq!(meaning(b"torch.sparse", b"FloatTensor"), Meaning::Harmless);
        assert_eq!(meaning(b"torch", b"uint4"), Meaning::Harmless);
        assert_eq!(meaning(b"torch", b"uint12"), Meaning::Unknown);
    }
}
