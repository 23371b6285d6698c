{{/*
One sidecar of the controller: (dict "name" "provisioner" "values" .Values.sidecars.provisioner "args" (list ...)).
extraArgs come last and so win. No leader election: there is one controller.
*/}}
{{- define "csi-quobyte.sidecar" -}}
- name: csi-{{ .name }}
  image: {{ .values.image.repository }}:{{ .values.image.tag }}
  imagePullPolicy: {{ .values.image.pullPolicy }}
  args:
    - --csi-address=/csi/csi.sock
    - --v={{ .values.logLevel }}
    {{- range concat .args .values.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  securityContext:
    {{- include "csi-quobyte.unprivileged" . | nindent 4 }}
  {{- with .values.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - name: socket
      mountPath: /csi
    - name: api-access
      mountPath: /var/run/secrets/kubernetes.io/serviceaccount
      readOnly: true
{{- end }}

{{- define "csi-quobyte.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
