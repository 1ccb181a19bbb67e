#include "python/backward_hook.h"

#include "python/training_pass.h"

namespace lipcore {
namespace {

struct BackwardHook {
  PyObject_HEAD PyObject* begin;
  int64_t task;  // the backward pass in which it was called last
};

BackwardHook* of(PyObject* self) { return reinterpret_cast<BackwardHook*>(self); }

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  PyObject* begin = Py_None;
  static const char* names[] = {"begin", nullptr};
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|O", const_cast<char**>(names), &begin)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  Py_INCREF(begin);
  of(self)->begin = begin;
  of(self)->task = -1;
  return self;
}

void destroy(PyObject* self) {
  PyObject_GC_UnTrack(self);
  PyTypeObject* type = Py_TYPE(self);
  Py_CLEAR(of(self)->begin);
  type->tp_free(self);
  Py_DECREF(type);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(of(self)->begin);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(of(self)->begin);
  return 0;
}

PyObject* call(PyObject* self, PyObject*, PyObject*) {
  BackwardHook* hook = of(self);
  int64_t task;
  if (!backward_task(&task)) return nullptr;
  if (task == hook->task || !hook->begin || hook->begin == Py_None) Py_RETURN_NONE;
  hook->task = task;
  PyObject* result = PyObject_CallNoArgs(hook->begin);
  if (!result) return nullptr;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

PyObject* forget(PyObject* self, PyObject*) {
  of(self)->task = -1;
  Py_RETURN_NONE;
}

PyObject* reduce(PyObject* self, PyObject*) { return Py_BuildValue("O()", Py_TYPE(self)); }

PyMethodDef kMethods[] = {{"forget", &forget, METH_NOARGS, "forget($self, /)\n--\n\nMakes the next call a first one."},
                          {"__reduce__", &reduce, METH_NOARGS, "__reduce__($self, /)\n--\n\nA copy does nothing."},
                          {nullptr, nullptr, 0, nullptr}};

PyType_Slot kSlots[] = {{Py_tp_doc, const_cast<char*>("Calls once per backward pass.")},
                        {Py_tp_new, reinterpret_cast<void*>(&make)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                        {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                        {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                        {Py_tp_call, reinterpret_cast<void*>(&call)},
                        {Py_tp_methods, kMethods},
                        {0, nullptr}};

PyType_Spec kSpec = {"lipcore._core.BackwardHook", sizeof(BackwardHook), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                     kSlots};

}  // namespace

PyObject* make_backward_hook_type() { return PyType_FromSpec(&kSpec); }

}  // namespace lipcore
