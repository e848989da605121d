"""What crosses a process or a plane. Standard library only.

* ``tasks``     PromptTask: a prompt to capture, with its recorded tokens
* ``capture``   CaptureSpec: which hidden states an algorithm wants; TargetInfo: what is known of a target
* ``features``  FeatureSpec, FeatureHandle and the one buffer layout of a sample
* ``refs``      Slot, SampleRef and SlotRef: what names captured features and where they are trained
* ``batches``   TrainBatch and StepBatches: what the trainer sees
* ``codec``     versioned JSON of every record, ``assert_no_tensors``
"""
